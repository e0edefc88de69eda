"""Sensitivity: the mean Hessian trace of the CTC loss for every matrix (eq. 4 and 5 of the paper).

- ``hutchinson``, the paper's: the trace of the Hessian for the transcripts. PyTorch's CTC loss has no second
  derivative, so the Hessian-vector product is a central difference of gradients,
  Hz ≈ (∇L(w + εz) − ∇L(w − εz)) / 2ε. One z over all matrices gives the traces of all of them, because the products
  between different matrices have expectation zero. The loss is not convex: a trace may be negative.
- ``fisher``: the trace of the Fisher information E ∇log p(y) ∇log p(y)ᵀ, the mean of ‖∇log p(y)‖² over transcripts y
  that the model itself gives with the probability p(y), which is the Hessian's mean over them. A path of frames drawn
  from the posteriors and collapsed is such a transcript, so that none has to be known, and no trace is negative. The
  square is that of a single utterance's gradient: every utterance takes a backward pass of its own.

Only the ranking of the matrices is used, so that the estimation may stop as soon as more batches would hardly change
it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from sparsewav.errors import UserError
from sparsewav.pruning import distributed
from sparsewav.pruning.batches import as_sequence, model_batches, single_utterances
from sparsewav.pruning.encoder import (
    PrunableMatrix,
    in_evaluation_mode,
    output_counts,
    prunable_matrices,
    whatever_modes,
)
from sparsewav.pruning.hessian import Progress
from sparsewav.settings.pruning import TRANSFORMER

LEAST_BATCHES = 8
"""Batches before the estimation may stop; standard errors from fewer are unreliable."""

Sample = tuple[int, list[float]]
"""A number of utterances, and an estimate of the trace of every matrix for their mean loss."""


@dataclass(frozen=True)
class Trace:
    """The estimate of the trace of one matrix's diagonal block of the Hessian, or of the Fisher information.

    Attributes:
        value: The trace, for the mean loss per utterance.
        standard_error: The standard error of the value over the samples; NaN from a single one.
        size: The number of diagonal elements.
        samples: The number of samples in the estimate: pairs of a probe and a batch, or utterances for ``fisher``.
        gradients: The number of gradients that they took: two of a batch for every pair, or ``probes`` of an utterance.
    """

    value: float
    standard_error: float
    size: int
    samples: int = 1
    gradients: int = 2

    @property
    def sensitivity(self) -> float:
        """The mean diagonal element (eq. 5)."""
        return self.value / self.size


def estimate_traces(
    model: PreTrainedModel,
    batches: Iterable[dict[str, Tensor]],
    *,
    scope: str = TRANSFORMER,
    trace: str = "hutchinson",
    probes: int = 1,
    distribution: str = "gaussian",
    epsilon: float = 1e-3,
    rank_tolerance: float = 0.0,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Trace]:
    """Estimate the trace of the Hessian, or of the Fisher information, for every prunable matrix.

    Every pair of a probe and a batch has its own z, and every utterance its own transcripts, so that more batches also
    mean more probes. The batches are taken in random order. In a process group each process takes its share of them,
    and all get the same traces.

    Args:
        model: A CTC model, float32 or float64; its weights are bit for bit the same afterwards.
        batches: Calibration batches, with ``labels`` for ``hutchinson``; ``fisher`` does not read them.
        scope: Of which matrices, as in :func:`~sparsewav.pruning.encoder.prunable_matrices`.
        trace: Of what: ``hutchinson``, the Hessian for the transcripts (the paper's), or ``fisher``, the Fisher
            information of the model's own transcripts, which is never negative.
        probes: The number of vectors z for each batch, or of transcripts drawn for each utterance.
        distribution: The distribution of z's elements: ``gaussian`` (the paper's) or ``rademacher``, which has less
            variance.
        epsilon: The norm of the step εz relative to that of the weights.
        rank_tolerance: Stop once the expected displacement of a rank (:func:`rank_displacement`) is not above this; 0
            takes all batches.
        seed: The seed of z, of the transcripts drawn, and of the batches' order.
        progress: Called after every batch.

    Returns:
        The traces, by matrix name.

    Raises:
        UserError: There is no batch, a batch has no labels that are needed, a loss or a posterior is not finite, or the
            model is in half precision.
    """
    if model.dtype not in (torch.float32, torch.float64):
        raise UserError(
            f"sensitivities need a model in float32, this one is in {model.dtype}; load it with dtype=float32"
        )
    if probes < 1 or distribution not in ("gaussian", "rademacher"):
        raise UserError(f"probes={probes}, distribution={distribution}: give 1 or more, and gaussian or rademacher")
    if trace not in ("hutchinson", "fisher"):
        raise UserError(f"trace={trace} does not exist; choose one of hutchinson, fisher")
    matrices = prunable_matrices(model, scope)
    sized = as_sequence(batches)
    order = torch.randperm(len(sized), generator=torch.Generator().manual_seed(_seed_of(seed))).tolist()
    products: list[Tensor] = []  # of every sample, shape (matrices,)
    weights: list[int] = []
    traces: dict[str, Trace] = {}
    done, settled = 0, False
    with (
        whatever_modes(model.device),
        in_evaluation_mode(model),
        only_matrices_trainable(model, matrices),
        _summed_loss(model),
        torch.enable_grad(),
    ):
        step = epsilon * _norm([matrix.weight for matrix in matrices])

        def samples(index: int) -> list[Sample]:
            parts = list(model_batches(model, sized[index], index))
            if trace == "fisher":
                found = _squared_gradients(model, matrices, parts, probes, (seed, index))
            else:
                found = _hessian_forms(model, matrices, parts, probes, distribution, step, (seed, index))
            for _, values in found:
                if not np.isfinite(values).all():
                    name = matrices[int(np.isfinite(values).argmin())].name
                    raise UserError(
                        f"the gradient of the CTC loss for {name} is NaN or infinite on calibration batch {index}; "
                        "check the model's weights"
                    )
            return found

        for start in range(0, len(order), distributed.world()):  # a batch for each process
            place = start + distributed.rank()
            with distributed.together():
                own = samples(order[place]) if place < len(order) else None
            for found in distributed.gather(own):
                if found is None or settled:  # a single process would have stopped before this batch
                    continue
                for utterances, values in found:
                    products.append(torch.tensor(values, dtype=torch.float64))
                    weights.append(utterances)
                done += 1
                traces = _traces(matrices, products, weights, probes if trace == "fisher" else 2)
                settled = done >= LEAST_BATCHES and rank_displacement(traces) <= rank_tolerance
            if progress:
                progress(len(order) if settled else done, len(order))
            if settled:
                break
    if not products:
        raise UserError("the calibration set is empty; give at least one utterance")
    return traces


def _traces(
    matrices: list[PrunableMatrix], products: list[Tensor], weights: list[int], gradients: int
) -> dict[str, Trace]:
    values, errors = _weighted_mean(torch.stack(products), torch.tensor(weights, dtype=torch.float64))
    return {
        matrix.name: Trace(value, error, matrix.size, len(products), gradients * len(products))
        for matrix, value, error in zip(matrices, values.tolist(), errors.tolist(), strict=True)
    }


def rank_displacement(traces: dict[str, Trace]) -> float:
    """Give the expected displacement of a rank, as a share of all ranks and averaged over the matrices.

    A pair of matrices is in the wrong order with the probability that a normal variable with the mean and standard
    error of the pair's difference has the other sign. The result is NaN if the traces come from a single sample.
    """
    means = torch.tensor([trace.sensitivity for trace in traces.values()], dtype=torch.float64)
    errors = torch.tensor([trace.standard_error / trace.size for trace in traces.values()], dtype=torch.float64)
    if len(means) < 2:
        return 0.0
    difference = (means[:, None] - means).abs()
    spread = (errors[:, None].square() + errors.square()).sqrt()
    wrong = torch.special.ndtr(-difference / spread.clamp(min=1e-300))  # (matrices, matrices)
    wrong.fill_diagonal_(0.0)
    return float(wrong.sum(1).mean()) / (len(means) - 1)


def unseparated_neighbors(traces: dict[str, Trace]) -> int:
    """Count neighbours in the ranking whose sensitivities differ by less than the difference's standard error."""
    ordered = sorted(traces.values(), key=lambda trace: trace.sensitivity)
    return sum(
        not (second.sensitivity - first.sensitivity)
        > ((first.standard_error / first.size) ** 2 + (second.standard_error / second.size) ** 2) ** 0.5
        for first, second in pairwise(ordered)
    )


def _seed_of(*entropy: int) -> int:
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]) % 2**63


def _draw(matrix: PrunableMatrix, distribution: str, generator: torch.Generator) -> Float[Tensor, "rows cols"]:
    z = torch.randn(matrix.weight.shape, generator=generator)
    z = z.sign() if distribution == "rademacher" else z
    return z.to(matrix.weight.device, matrix.weight.dtype)


def _norm(tensors: Sequence[Tensor]) -> float:
    return float(sum(tensor.detach().double().square().sum() for tensor in tensors) ** 0.5)


def _hessian_forms(
    model: PreTrainedModel,
    matrices: list[PrunableMatrix],
    batches: list[dict[str, Tensor]],
    probes: int,
    distribution: str,
    step: float,
    entropy: tuple[int, int],
) -> list[Sample]:
    """Give zᵢᵀ(Hz)ᵢ of every matrix for some random z, each at a distance of ``step`` from the weights."""
    utterances = sum(len(batch["attention_mask"]) for batch in batches)
    found = []
    for probe in range(probes):
        generator = torch.Generator().manual_seed(_seed_of(*entropy, probe))
        z = [_draw(matrix, distribution, generator) for matrix in matrices]
        forms = _quadratic_forms(model, matrices, batches, z, step / _norm(z))
        found.append((utterances, (forms / utterances).tolist()))
    return found


def _quadratic_forms(
    model: PreTrainedModel,
    matrices: list[PrunableMatrix],
    batches: list[dict[str, Tensor]],
    z: list[Float[Tensor, "_rows _cols"]],
    epsilon: float,
) -> Float[Tensor, " matrices"]:
    """Give zᵢᵀ(Hz)ᵢ of every matrix in float64, for the loss summed over the batches."""
    originals = [matrix.weight.detach().clone() for matrix in matrices]
    products: list[Tensor] = []
    try:
        for sign in (1, -1):
            for matrix, original, direction in zip(matrices, originals, z, strict=True):
                matrix.weight.data.copy_(original).add_(direction, alpha=sign * epsilon)
            products.append(_products_with_gradients(model, matrices, batches, z))
    finally:
        for matrix, original in zip(matrices, originals, strict=True):
            matrix.weight.data.copy_(original)
    return (products[0] - products[1]) / (2 * epsilon)


def _products_with_gradients(
    model: PreTrainedModel,
    matrices: list[PrunableMatrix],
    batches: list[dict[str, Tensor]],
    z: list[Float[Tensor, "_rows _cols"]],
) -> Float[Tensor, " matrices"]:
    """Give zᵢᵀ∇ᵢL of every matrix in float64."""

    def product(index: int, gradient: Tensor) -> Tensor:
        return (z[index].double() * gradient.reshape(z[index].shape).double()).sum()

    with _reduced_gradients(matrices, product) as products:
        for batch in batches:
            if "labels" not in batch:
                raise UserError(
                    "sensitivities need transcripts: give the calibration batches labels, or choose "
                    "allocation.trace=fisher or allocation=uniform"
                )
            loss = model(**batch).loss
            if not loss.isfinite():
                raise UserError(
                    "the CTC loss of a calibration batch is not finite: a transcript is longer than its audio has "
                    "frames, or the model's weights are broken; remove that utterance"
                )
            loss.backward()
    return products


def _squared_gradients(
    model: PreTrainedModel,
    matrices: list[PrunableMatrix],
    batches: list[dict[str, Tensor]],
    draws: int,
    entropy: tuple[int, int],
) -> list[Sample]:
    """Give ‖∇ᵢ log p(y)‖² of every matrix for every utterance, the mean over transcripts y drawn from the model."""
    blank = model.config.pad_token_id
    utterances = [utterance for batch in batches for utterance in single_utterances(model, batch)]
    found = []
    for number, utterance in enumerate(utterances):
        inputs = {name: value for name, value in utterance.items() if name != "labels"}
        frames = int(output_counts(model, inputs["attention_mask"].sum(-1)))
        log_posteriors = model(**inputs).logits[0, :frames].log_softmax(-1)
        if not log_posteriors.isfinite().all():
            raise UserError(
                f"the model's posteriors are NaN or infinite on calibration batch {entropy[1]}; check its weights"
            )
        generator = torch.Generator().manual_seed(_seed_of(*entropy, number))
        with _reduced_gradients(matrices, lambda _, gradient: gradient.double().square().sum()) as squares:
            for draw, labels in enumerate(draw_transcripts(log_posteriors.detach(), blank, draws, generator)):
                loss = functional.ctc_loss(
                    log_posteriors[:, None],
                    labels[None].to(log_posteriors.device),
                    torch.tensor([frames]),
                    torch.tensor([len(labels)]),
                    blank,
                    reduction="sum",
                )
                loss.backward(retain_graph=draw < draws - 1)
        found.append((1, (squares / draws).tolist()))
    return found


def draw_transcripts(
    log_posteriors: Float[Tensor, "frames characters"], blank: int, count: int, generator: torch.Generator
) -> list[Int[Tensor, " _labels"]]:
    """Draw transcripts y with their probability p(y) under CTC, from which the blank is missing.

    A path has the product of its characters' posteriors as its probability, and p(y) is the sum over the paths that
    collapse to y (Graves et al. 2006, eq. 2 and 3): to draw every frame by itself and to collapse is to draw from p.
    """
    paths = torch.multinomial(log_posteriors.double().exp().cpu(), count, replacement=True, generator=generator)
    collapsed = (torch.unique_consecutive(path) for path in paths.T)
    return [characters[characters != blank] for characters in collapsed]


@contextmanager
def _reduced_gradients(
    matrices: list[PrunableMatrix], reduce: Callable[[int, Tensor], Tensor]
) -> Iterator[Float[Tensor, " matrices"]]:
    """Within the block, backward passes add a number of every matrix's gradient to what is given, in float64.

    Every gradient is freed as soon as it was reduced, so that no two are held.
    """
    sums = torch.zeros(len(matrices), dtype=torch.float64)

    def add(index: int) -> Callable[[Tensor], None]:
        def hook(weight: Tensor) -> None:
            assert weight.grad is not None
            sums[index] += reduce(index, weight.grad).cpu()
            weight.grad = None

        return hook

    hooks = [matrix.parameter.register_post_accumulate_grad_hook(add(index)) for index, matrix in enumerate(matrices)]
    try:
        yield sums
    finally:
        for hook in hooks:
            hook.remove()


def _weighted_mean(
    values: Float[Tensor, "samples matrices"], weights: Float[Tensor, " samples"]
) -> tuple[Float[Tensor, " matrices"], Float[Tensor, " matrices"]]:
    """Give the weighted mean over the samples and its standard error."""
    shares = (weights / weights.sum())[:, None]
    mean = (shares * values).sum(0)
    count = len(values)
    if count == 1:
        return mean, torch.full_like(mean, float("nan"))
    variance = (shares.square() * (values - mean).square()).sum(0) * count / (count - 1)
    return mean, variance.sqrt()


@contextmanager
def only_matrices_trainable(model: PreTrainedModel, matrices: list[PrunableMatrix]) -> Iterator[None]:
    """Within the block, only the prunable weights require gradients, so that what is before them keeps no activations.

    Gradients that a training left are put aside, because new ones would be added to them.
    """
    before = {parameter: (parameter.requires_grad, parameter.grad) for parameter in model.parameters()}
    for parameter in before:
        parameter.requires_grad_(False).grad = None
    for matrix in matrices:
        matrix.parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, (requires_grad, gradient) in before.items():
            parameter.requires_grad_(requires_grad).grad = gradient


@contextmanager
def _summed_loss(model: PreTrainedModel) -> Iterator[None]:
    """Within the block, the model sums its CTC loss over the utterances and does not replace an infinite one by 0."""
    before = model.config.ctc_loss_reduction, model.config.ctc_zero_infinity
    model.config.ctc_loss_reduction, model.config.ctc_zero_infinity = "sum", False
    try:
        yield
    finally:
        model.config.ctc_loss_reduction, model.config.ctc_zero_infinity = before
