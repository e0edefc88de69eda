"""The judge: how far a pruned model's output is from the dense model's, without any transcript.

It is the divergence KL(dense || pruned) of the posteriors of characters, mean over the frames of some utterances. What
does not change from one judgement to the next is not computed again: the features of the front end never do, and while
layers alone from some layer on are changed, neither do the outputs of those before it.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsewav.errors import UserError
from sparsewav.pruning.allocation.sensitivity import only_matrices_trainable
from sparsewav.pruning.encoder import (
    PrunableMatrix,
    base_of,
    encoder_layers,
    model_batches,
    projections_as_modules,
    prunable_matrices,
)
from sparsewav.pruning.hidden_states import frame_mask_of


class Judge:
    """Compares a model, as its weights are now, with what it was when the judge was made.

    Attributes:
        evaluations: how many judgements were made.
        frames: of the utterances.
    """

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, batches: Iterable[dict[str, Tensor]]) -> None:
        """Args: model: dense, in evaluation mode. batches: what to judge on; labels are not read.

        Raises:
            UserError: there is no batch.
        """
        self.model = model
        self.evaluations = 0
        self._layers = encoder_layers(model)
        self._front: nn.Module = base_of(model).feature_extractor
        self._parts = [
            {name: value for name, value in part.items() if name != "labels"}
            for batch in batches
            for part in model_batches(model, batch)
        ]
        if not self._parts:
            raise UserError("the judge has no utterance to listen to; give at least one")
        self._masks = [frame_mask_of(model, part) for part in self._parts]
        self._heard = [_output_mask(model, part) for part in self._parts]
        self.frames = sum(int(mask.sum()) for mask in self._heard)
        self._features: list[Any] = [self._front(part["input_values"]) for part in self._parts]
        # (frames, characters) of every part, padded frames left out
        self._dense = [self._log_posteriors(index) for index in range(len(self._parts))]
        self._kept: list[Any] | None = None
        self._kept_layers = 0

    def _log_posteriors(self, index: int) -> Tensor:
        with _answering(self._front, self._features[index]):
            logits = self.model(**self._parts[index]).logits
        return logits.float().log_softmax(-1)[self._heard[index]]

    @torch.no_grad()
    def divergence(self) -> float:
        """KL(dense || as it is now) in nats, mean over frames."""
        self.evaluations += 1
        total = 0.0
        for index, dense in enumerate(self._dense):
            with ExitStack() as answers:
                if self._kept is not None:
                    for layer in self._layers[: self._kept_layers]:
                        answers.enter_context(_answering(layer, self._kept[index]))
                now = self._log_posteriors(index)
            total += float((dense.exp() * (dense - now)).sum(dtype=torch.float64))
        return total / self.frames

    @contextmanager
    def resuming_at(self, layer: int) -> Iterator[None]:
        """Within the block, layers below ``layer`` keep their weights and are not computed again."""
        if layer == 0:
            yield
            return
        kept: list[Any] = []
        hook = self._layers[layer - 1].register_forward_hook(lambda module, args, output: kept.append(output))
        try:
            with torch.no_grad():
                for index in range(len(self._parts)):
                    self._log_posteriors(index)
        finally:
            hook.remove()
        self._kept, self._kept_layers = kept, layer
        try:
            yield
        finally:
            self._kept, self._kept_layers = None, 0

    def output_fisher(self, seed: int = 0) -> dict[str, Tensor]:
        """Diagonal Fisher information of every matrix's output, mean over frames; by matrix, shape (rows,).

        It is the mean square of the gradient of log p(c) at the matrix's output, where c is drawn from the posteriors
        of each frame: half of it, times the mean squared error of that output, is the divergence that the error makes,
        to second order and where errors of different rows are independent.
        """
        matrices = prunable_matrices(self.model)
        device = self.model.device
        sums = {matrix.name: torch.zeros(matrix.weight.shape[0], dtype=torch.float64) for matrix in matrices}
        generator = torch.Generator().manual_seed(seed)

        def watch(matrix: PrunableMatrix, mask: Tensor) -> Any:
            def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
                output.register_hook(add)

            def add(gradient: Tensor) -> None:
                own = gradient.reshape(-1, gradient.shape[-1])[mask.flatten()]
                sums[matrix.name] += own.square().sum(0, dtype=torch.float64).cpu()

            return matrix.module.register_forward_hook(hook)

        with only_matrices_trainable(self.model, matrices), projections_as_modules(self.model), torch.enable_grad():
            for index, mask in enumerate(self._masks):
                hooks = [watch(matrix, mask) for matrix in matrices]
                try:
                    now = self._log_posteriors(index)
                    drawn = torch.multinomial(now.detach().exp().cpu(), 1, generator=generator).to(device)
                    now.gather(1, drawn).sum().backward()
                finally:
                    for hook in hooks:
                        hook.remove()
                for matrix in matrices:
                    matrix.weight.grad = None
        return {name: total / self.frames for name, total in sums.items()}


def _output_mask(model: PreTrainedModel, part: dict[str, Tensor]) -> Tensor:
    """Shape (batch, frames of the output), True where an utterance has one: an adapter makes them fewer."""
    lengths: Any = model._get_feat_extract_output_lengths
    counts = lengths(part["attention_mask"].sum(-1))
    frames = int(lengths(torch.tensor(part["attention_mask"].shape[-1])))
    return torch.arange(frames, device=counts.device) < counts[:, None]


@contextmanager
def _answering(module: nn.Module, answer: Any) -> Iterator[None]:
    """Within the block, a module gives this answer to whatever it is asked."""
    before = module.__dict__.get("forward")
    module.forward = lambda *args, **kwargs: answer
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before
