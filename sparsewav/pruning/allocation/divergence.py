"""Output divergence: how far a pruned model's output is from the dense model's; it needs no transcripts.

It is the divergence KL(dense || pruned) of the character posteriors, averaged over the frames of the evaluation
batches; of an encoder without a head it is the squared error of the last hidden states over their squares. What is the
same in all evaluations is computed once: the features of the front end, unless it is pruned, too, and, while only
layers from a certain one on are changed, the outputs of all that is before it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from sparsewav.errors import UserError
from sparsewav.pruning.allocation.sensitivity import only_matrices_trainable
from sparsewav.pruning.batches import model_batches
from sparsewav.pruning.channels import FrontLevels
from sparsewav.pruning.encoder import (
    FRONT,
    PrunableMatrix,
    base_of,
    encoder_layers,
    has_head,
    output_counts,
    output_rows,
    projections_as_modules,
)
from sparsewav.pruning.families import family_of
from sparsewav.pruning.hidden_states import layer_masks, valid_rows, valid_rows_of


class OutputDivergence:
    """Compares a model with the dense model that it was when this object was created.

    Attributes:
        evaluations: How often the divergence was measured.
        frames: The number of frames of the evaluation batches.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: PreTrainedModel,
        batches: Iterable[dict[str, Tensor]],
        pieces: Sequence[PrunableMatrix | FrontLevels],
    ) -> None:
        """Compute the output of the dense model.

        Args:
            model: A dense CTC model, or an encoder without a head, in evaluation mode.
            batches: The evaluation batches; labels are not read.
            pieces: The matrices that may change between two measurements, and the front end if it may.

        Raises:
            UserError: There is no batch.
        """
        self.model = model
        self.evaluations = 0
        self._matrices = [piece for piece in pieces if isinstance(piece, PrunableMatrix)]
        self._front_changes = any(piece.layer == FRONT for piece in pieces)
        self._layers = encoder_layers(model)
        self._front: nn.Module = base_of(model).get_submodule(family_of(model).front)
        self._parts = [
            {name: value for name, value in part.items() if name != "labels"}
            for number, batch in enumerate(batches)
            for part in model_batches(model, batch, number)
        ]
        if not self._parts:
            raise UserError("the output divergence has no utterance to be measured on; give at least one")
        self._masks = [layer_masks(model, part) for part in self._parts]
        self._output_masks = [output_mask(model, part) for part in self._parts]
        self.frames = sum(int(mask.sum()) for mask in self._output_masks)
        self._features: list[Any] = []  # of the front end for every part, while they stay the same
        self._has_head = has_head(model)
        # shape (frames, characters or width) for every part, without padded frames
        self._dense, (features,) = self._run([self._front])
        if not self._front_changes:
            self._features = features
        # What the sum over all frames is divided by.
        self._scale = self.frames if self._has_head else self._squares()
        self._kept: list[Any] | None = None
        self._kept_layers = 0

    def _output(self, index: int) -> Float[Tensor, "frames outputs"]:
        """Give the log posteriors of the characters, or the last hidden states of an encoder."""
        known = index < len(self._features)
        with _returning(self._front, self._features[index]) if known else nullcontext():
            return model_output(self.model, self._parts[index], self._output_masks[index])

    def _run(self, modules: Sequence[nn.Module]) -> tuple[list[Tensor], list[list[Any]]]:
        """Give the output for every part, and what some modules put out on the way."""
        caught: list[list[Any]] = [[] for _ in modules]
        hooks = [
            module.register_forward_hook(lambda module, args, output, found=found: found.append(output))
            for module, found in zip(modules, caught, strict=True)
        ]
        try:
            return [self._output(index) for index in range(len(self._parts))], caught
        finally:
            for hook in hooks:
                hook.remove()

    def _squares(self) -> float:
        return sum(float(states.square().sum(dtype=torch.float64)) for states in self._dense)

    @torch.no_grad()
    def measure(self) -> float:
        """Give KL(dense || current) in nats, averaged over the frames; of an encoder the relative squared error."""
        self.evaluations += 1
        total = 0.0
        for index, dense in enumerate(self._dense):
            with ExitStack() as stack:
                if self._kept is not None:
                    for layer in self._layers[: self._kept_layers]:
                        stack.enter_context(_returning(layer, self._kept[index]))
                now = self._output(index)
            distance = dense.exp() * (dense - now) if self._has_head else (dense - now).square()
            total += float(distance.sum(dtype=torch.float64))
        return total / self._scale

    @contextmanager
    def resuming_at(self, layer: int) -> Iterator[None]:
        """Within the block, the outputs of what is before ``layer``, whose weights must not change, are reused."""
        if layer == FRONT or (layer == 0 and not self._front_changes):
            yield
            return
        features = self._features
        with torch.no_grad():
            _, (self._features, *kept) = self._run([self._front, *self._layers[max(layer - 1, 0) : layer]])
        if kept:
            self._kept, self._kept_layers = kept[0], layer
        try:
            yield
        finally:
            self._features, self._kept, self._kept_layers = features, None, 0

    def output_fisher(self, seed: int = 0) -> dict[str, Float[Tensor, " _rows"]]:
        """Give the diagonal Fisher information of every matrix's output, averaged over the frames, by matrix name.

        It is the mean square of the gradient of log p(c) with respect to the matrix's output, where c is drawn from the
        posteriors of each frame. Half of it, times the mean squared error of that output, is the divergence that the
        error causes, to second order and if the errors of different rows are independent.
        """
        matrices = self._matrices
        sums = {matrix.name: torch.zeros(matrix.weight.shape[0], dtype=torch.float64) for matrix in matrices}
        generator = torch.Generator().manual_seed(seed)

        def add(name: str, gradients: Float[Tensor, "rows features"]) -> None:
            sums[name] += gradients.square().sum(0, dtype=torch.float64).cpu()

        with only_matrices_trainable(self.model, matrices), projections_as_modules(self.model), torch.enable_grad():
            for index, masks in enumerate(self._masks):
                backpropagate_samples(partial(self._output, index), matrices, masks, generator, add)
        return {name: total / self.frames for name, total in sums.items()}


def backpropagate_samples(
    output: Callable[[], Float[Tensor, "frames outputs"]],
    matrices: Sequence[PrunableMatrix],
    masks: Mapping[int, Bool[Tensor, "_batch _length"]],
    generator: torch.Generator,
    add: Callable[[str, Float[Tensor, "_rows _features"]], None],
    *,
    of_posteriors: bool = True,
    layers: Mapping[str, nn.Module] | None = None,
) -> None:
    """Draw what the model predicts for every frame of a batch, and give its gradients at outputs within the model.

    They are the gradients of the log-likelihood of the draw, summed over the frames, so that their second moments are
    the Fisher information of the model's output. A label is drawn from the posteriors of a frame, and for hidden states
    their difference to a draw from the normal distribution of variance one around them.

    Args:
        output: Runs the model on the batch with gradients; gives the log posteriors of the characters, or the last
            hidden states, of the frames of utterances.
        matrices: The matrices at whose outputs, and whose parameters require gradients.
        masks: Where the batch has frames (:func:`~sparsewav.pruning.hidden_states.layer_masks`).
        generator: Draws, on the CPU.
        add: Called with the name of a matrix or layer and the gradients at the rows of its output that belong to an
            utterance; several times where its module is called several times.
        of_posteriors: Whether the output is log posteriors.
        layers: The layers of the encoder, in their order, where their outputs are to be watched, too.

    Raises:
        UserError: The output is not finite.
    """

    def watch(matrix: PrunableMatrix) -> RemovableHandle:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            output.register_hook(take)

        def take(gradient: Float[Tensor, "batch _ _"]) -> None:
            rows = output_rows(matrix.module, gradient)
            valid = valid_rows_of(matrix, masks, rows.shape[1])
            if len(rows) < len(valid):  # position embeddings, one for all utterances of the batch
                valid = valid.any(0, keepdim=True)
            add(matrix.name, rows[valid])

        return matrix.module.register_forward_hook(hook)

    def watch_layer(index: int, name: str, layer: nn.Module) -> RemovableHandle:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            states = output[0] if isinstance(output, tuple) else output
            if states.requires_grad:  # not where nothing prunable is left in it and before it
                states.register_hook(lambda gradient: add(name, gradient[valid_rows(masks[index], gradient.shape[1])]))

        return layer.register_forward_hook(hook)

    hooks = [watch(matrix) for matrix in matrices]
    hooks += [watch_layer(index, name, layer) for index, (name, layer) in enumerate((layers or {}).items())]
    try:
        now = output()
        if not now.isfinite().all():
            raise UserError(
                "the model's outputs on the calibration set are NaN or infinite; check the model's weights, or load it "
                "in float32"
            )
        if of_posteriors:
            drawn = torch.multinomial(now.detach().exp().cpu(), 1, generator=generator).to(now.device)
            now.gather(1, drawn).sum().backward()
        else:
            (now * torch.randn(now.shape, generator=generator).to(now.device)).sum().backward()
    finally:
        for hook in hooks:
            hook.remove()
    for matrix in matrices:
        matrix.parameter.grad = None


def model_output(
    model: PreTrainedModel, part: dict[str, Tensor], mask: Bool[Tensor, "batch frames"]
) -> Float[Tensor, "_ outputs"]:
    """Give the log posteriors of the characters, or the last hidden states of an encoder, of some frames of a batch."""
    output = model(**part)
    values = output.logits.float().log_softmax(-1) if has_head(model) else output.last_hidden_state.float()
    return values[mask]


def output_mask(model: PreTrainedModel, part: dict[str, Tensor]) -> Bool[Tensor, "batch frames"]:
    """Give a mask that is True where an utterance has a frame of the output, which an adapter may have subsampled."""
    counts = output_counts(model, part["attention_mask"].sum(-1))
    frames = int(output_counts(model, torch.tensor([part["attention_mask"].shape[-1]])))
    return torch.arange(frames, device=counts.device) < counts[:, None]


@contextmanager
def _returning(module: nn.Module, value: Any) -> Iterator[None]:
    """Within the block, a module returns this value instead of computing its output."""
    before = module.__dict__.get("forward")
    module.forward = lambda *args, **kwargs: value
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before
