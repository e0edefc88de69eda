"""Sensitivity: the mean Hessian trace of the CTC loss for every matrix (eq. 4 and 5 of the paper).

PyTorch's CTC loss has no second derivative, so the Hessian-vector product is a central difference of gradients,
Hz ≈ (∇L(w + εz) − ∇L(w − εz)) / 2ε. One z over all matrices gives the traces of all of them, because the products
between different matrices have expectation zero. Only the ranking of the matrices is used, so that the estimation may
stop as soon as more batches would hardly change it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from sparsewav.errors import UserError
from sparsewav.pruning import distributed
from sparsewav.pruning.encoder import (
    PrunableMatrix,
    as_sequence,
    in_evaluation_mode,
    model_batches,
    prunable_matrices,
    whatever_modes,
)
from sparsewav.pruning.hessian import Progress
from sparsewav.settings.pruning import TRANSFORMER

LEAST_BATCHES = 8
"""Batches before the estimation may stop; standard errors from fewer are unreliable."""


@dataclass(frozen=True)
class Trace:
    """Hutchinson's estimate of the trace of one matrix's diagonal block of the Hessian.

    Attributes:
        value: The trace, for the mean loss per utterance.
        standard_error: The standard error of the value over probes and batches; NaN from a single sample.
        size: The number of diagonal elements.
        samples: The number of pairs of a probe and a batch in the estimate; each took two gradients.
    """

    value: float
    standard_error: float
    size: int
    samples: int = 1

    @property
    def sensitivity(self) -> float:
        """The mean diagonal element (eq. 5)."""
        return self.value / self.size


def estimate_traces(
    model: PreTrainedModel,
    batches: Iterable[dict[str, Tensor]],
    *,
    scope: str = TRANSFORMER,
    probes: int = 1,
    distribution: str = "gaussian",
    epsilon: float = 1e-3,
    rank_tolerance: float = 0.0,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Trace]:
    """Estimate the Hessian trace of every prunable matrix.

    Every pair of a probe and a batch has its own z, so that more batches also mean more probes. The batches are taken
    in random order. In a process group each process takes its share of them, and all get the same traces.

    Args:
        model: A CTC model, float32 or float64; its weights are bit for bit the same afterwards.
        batches: Calibration batches with ``labels``.
        scope: Of which matrices, as in :func:`~sparsewav.pruning.encoder.prunable_matrices`.
        probes: The number of vectors z for each batch.
        distribution: The distribution of z's elements: ``gaussian`` (the paper's) or ``rademacher``, which has less
            variance.
        epsilon: The norm of the step εz relative to that of the weights.
        rank_tolerance: Stop once the expected displacement of a rank (:func:`rank_displacement`) is not above this; 0
            takes all batches.
        seed: The seed of z and of the batches' order.
        progress: Called after every batch.

    Returns:
        The traces, by matrix name.

    Raises:
        UserError: There is no batch, a batch has no labels, a loss is not finite, or the model is in half precision.
    """
    if model.dtype not in (torch.float32, torch.float64):
        raise UserError(
            f"sensitivities need a model in float32, this one is in {model.dtype}; load it with dtype=float32"
        )
    if probes < 1 or distribution not in ("gaussian", "rademacher"):
        raise UserError(f"probes={probes}, distribution={distribution}: give 1 or more, and gaussian or rademacher")
    matrices = prunable_matrices(model, scope)
    sized = as_sequence(batches)
    order = torch.randperm(len(sized), generator=torch.Generator().manual_seed(_seed_of(seed))).tolist()
    products: list[Tensor] = []  # zᵢᵀ(Hz)ᵢ per utterance, shape (matrices,), for every probe and batch
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
        step_size = epsilon * _norm([matrix.weight for matrix in matrices])

        def sample(index: int) -> tuple[int, list[list[float]]]:
            parts = list(model_batches(model, sized[index], index))
            utterances = sum(len(part["attention_mask"]) for part in parts)
            found = []
            for probe in range(probes):
                generator = torch.Generator().manual_seed(_seed_of(seed, index, probe))
                z = [_draw(matrix, distribution, generator) for matrix in matrices]
                forms = _quadratic_forms(model, matrices, parts, z, step_size / _norm(z))
                if not forms.isfinite().all():
                    name = matrices[int(forms.isfinite().logical_not().nonzero()[0])].name
                    raise UserError(
                        f"the gradient of the CTC loss for {name} is NaN or infinite on calibration batch {index}; "
                        "check the model's weights"
                    )
                found.append((forms / utterances).tolist())
            return utterances, found

        for start in range(0, len(order), distributed.world()):  # a batch for each process
            place = start + distributed.rank()
            with distributed.together():
                own = sample(order[place]) if place < len(order) else None
            for result in distributed.gather(own):
                if result is None or settled:  # a single process would have stopped before this batch
                    continue
                utterances, found = result
                products += torch.tensor(found, dtype=torch.float64).unbind()
                weights += [utterances] * len(found)
                done += 1
                traces = _traces(matrices, products, weights)
                settled = done >= LEAST_BATCHES and rank_displacement(traces) <= rank_tolerance
            if progress:
                progress(len(order) if settled else done, len(order))
            if settled:
                break
    if not products:
        raise UserError("the calibration set is empty; give at least one utterance")
    return traces


def _traces(matrices: list[PrunableMatrix], products: list[Tensor], weights: list[int]) -> dict[str, Trace]:
    values, errors = _weighted_mean(torch.stack(products), torch.tensor(weights, dtype=torch.float64))
    return {
        matrix.name: Trace(value, error, matrix.size, len(products))
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
    """Give zᵢᵀ∇ᵢL of every matrix in float64; every gradient is freed as soon as it is multiplied."""
    products = torch.zeros(len(matrices), dtype=torch.float64)

    def multiply(index: int) -> Callable[[Tensor], None]:
        def hook(weight: Tensor) -> None:
            assert weight.grad is not None
            products[index] += (z[index].double() * weight.grad.reshape(z[index].shape).double()).sum().cpu()
            weight.grad = None

        return hook

    hooks = [
        matrix.parameter.register_post_accumulate_grad_hook(multiply(index)) for index, matrix in enumerate(matrices)
    ]
    try:
        for batch in batches:
            if "labels" not in batch:
                raise UserError(
                    "sensitivities need transcripts: give the calibration batches labels, or allocation=uniform"
                )
            loss = model(**batch).loss
            if not loss.isfinite():
                raise UserError(
                    "the CTC loss of a calibration batch is not finite: a transcript is longer than its audio has "
                    "frames, or the model's weights are broken; remove that utterance"
                )
            loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
    return products


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
