"""Self-pinching gates: every weight matrix learns the threshold below which its weights are zero (Xu et al. 2025).

"Effective and efficient one-pass compression of speech foundation models using sparsity-aware self-pinching gates",
Interspeech 2025, arXiv:2505.22608.

Theirs: one training prunes and tunes at once, from the dense model. A matrix W has one threshold t, which is learned
together with all weights. Its soft mask is σ((w² − t²) / 2τ) for a positive τ, and the model computes with W times that
mask rounded, which is 1 where w² ≥ t² and 0 elsewhere. The loss is CTC's, and aware of the sparsity.

Ours, where their abstract and the reviews that quote these equations do not say more: what is a layer there is a matrix
here; the rounding lets gradients pass as if it were not there; the loss adds ω (s − target)² for the share s of all
prunable weights that the masks remove, with a target that rises linearly; t and τ are in units of the root mean
square, and of the mean square, of the dense matrix; all thresholds grow or shrink by one factor in the end, so that the
sparsity is met to one weight; and every number of the settings.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from sparsewav.baselines.distillation import no_masking
from sparsewav.baselines.gated import MISSED, FollowTarget, SparseStudent
from sparsewav.baselines.magnitude import prune_lowest
from sparsewav.baselines.method import CompressionReport
from sparsewav.data.batches import collate
from sparsewav.data.utterances import Utterance
from sparsewav.models.processor import Processor
from sparsewav.pruning.encoder import PrunableMatrix, freeze_front_end, prunable_matrices
from sparsewav.pruning.hessian import Progress
from sparsewav.settings.baselines import SelfPinching
from sparsewav.training.trainer import ParameterGroup, train


def soft_mask(
    weight: Float[Tensor, "*shape"], threshold: Float[Tensor, ""], temperature: Float[Tensor, ""] | float
) -> Float[Tensor, "*shape"]:
    """Give σ((w² − t²) / 2τ), which is ½ where a weight is as large as the threshold."""
    return torch.sigmoid((weight.square() - threshold.square()) / (2 * temperature))


def hard_mask(
    weight: Float[Tensor, "*shape"], threshold: Float[Tensor, ""], temperature: Float[Tensor, ""] | float
) -> Float[Tensor, "*shape"]:
    """Give 1 where w² ≥ t² and 0 elsewhere, with the gradients of the soft mask in weight and threshold."""
    soft = soft_mask(weight, threshold, temperature)
    return (weight.square() >= threshold.square()).to(soft.dtype) + (soft - soft.detach())


class PinchingGate(nn.Module):
    """The gate of one matrix.

    Args:
        weight: The matrix, or the convolution, as it is at the start. Its mean square is the unit of w², t² and τ; if
            that is 0, the gate stays closed.
        threshold: t at the start, above 0: at 0 it has no gradient.
        temperature: τ.

    Attributes:
        threshold: The learned t, a scalar.
    """

    unit: Tensor

    def __init__(self, weight: Float[Tensor, "*shape"], threshold: float, temperature: float) -> None:
        super().__init__()
        mean_square = weight.detach().float().square().mean()
        self.register_buffer("unit", mean_square.clamp(min=torch.finfo(torch.float32).tiny).sqrt())
        self.threshold = nn.Parameter(torch.tensor(threshold, device=weight.device))
        self.temperature = temperature

    def forward(self, weight: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Give the hard mask of the matrix as it is now."""
        return hard_mask(weight / self.unit, self.threshold, self.temperature)

    @torch.no_grad()
    def margin(self, weight: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Give |w| / |t|, which is below 1 where a weight is removed."""
        return (weight / self.unit).abs() / self.threshold.abs().clamp(min=torch.finfo(torch.float32).tiny)


class PinchedStudent(SparseStudent):
    """A CTC model that computes with masked weights, and its loss with the penalty for missing the target.

    Args:
        student: CTC model, whose weights stay as they are beneath the masks.
        settings: Start and temperature of the gates, target, and weight of the penalty.

    Attributes:
        gates: A gate for each prunable matrix, in the order of the matrices.
    """

    def __init__(self, student: PreTrainedModel, settings: SelfPinching) -> None:
        super().__init__(student, settings.sparsity, settings.ramp_updates)
        self.sparsity_weight = settings.sparsity_weight
        self.matrices = prunable_matrices(student)
        self.gates = nn.ModuleList(
            PinchingGate(matrix.parameter, settings.first_threshold, settings.temperature) for matrix in self.matrices
        )
        self.size = sum(matrix.size for matrix in self.matrices)

    def items(self) -> list[tuple[PrunableMatrix, PinchingGate]]:
        """Give the matrices with their gates."""
        return list(zip(self.matrices, self.gates, strict=True))  # type: ignore[arg-type]

    def masks(self) -> list[Float[Tensor, "*shape"]]:
        """Give the hard masks of all matrices."""
        return [gate(matrix.parameter) for matrix, gate in self.items()]

    def sparsity_of(self, masks: Sequence[Float[Tensor, "*shape"]]) -> Float[Tensor, ""]:
        """Give the share of all prunable weights that masks remove, with the gradients of the soft masks."""
        return torch.stack([(1 - mask).sum() for mask in masks]).sum() / self.size

    @torch.no_grad()
    def expected_sparsity(self) -> Float[Tensor, ""]:
        """Give the share of the prunable weights that the gates remove now."""
        return self.sparsity_of(self.masks())

    def forward(self, **batch: Tensor) -> ModelOutput:
        """Give the loss of a batch."""
        masks = self.masks()
        masked = {
            f"{matrix.name}.weight": matrix.parameter * mask for matrix, mask in zip(self.matrices, masks, strict=True)
        }
        output: Any = functional_call(self.student, masked, kwargs=batch)
        gap = self.sparsity_of(masks) - self.current_target()
        return ModelOutput(loss=output.loss + self.sparsity_weight * gap.square())

    def prune(self) -> float:
        """Set to zero what the gates remove, and give the factor of all thresholds that meets the target exactly."""
        margins = [gate.margin(matrix.parameter) for matrix, gate in self.items()]
        return prune_lowest(self.matrices, margins, self.target)


@contextmanager
def mean_ctc_loss(model: PreTrainedModel) -> Iterator[None]:
    """Within the block, the CTC loss is the mean over characters and utterances, whatever the model's config says."""
    config: Any = model.config
    before, config.ctc_loss_reduction = config.ctc_loss_reduction, "mean"
    try:
        yield
    finally:
        config.ctc_loss_reduction = before


def compress(
    dense: PreTrainedModel,
    processor: Processor,
    training_set: Sequence[Utterance],
    settings: SelfPinching,
    folder: Path,
    *,
    seed: int,
    progress: Progress | None = None,
) -> tuple[PreTrainedModel, CompressionReport]:
    """Train weights and thresholds with the CTC loss, and set to zero what is below them at the end.

    See :class:`~sparsewav.baselines.Method` for the arguments. ``facts`` has the sparsity that the gates learned, the
    factor of the thresholds that met the target, and the sparsity of every matrix.
    """
    freeze_front_end(dense)
    student = PinchedStudent(dense, settings)
    thresholds = [gate.threshold for _, gate in student.items()]
    with no_masking(dense), mean_ctc_loss(dense):
        log = train(
            student,
            partial(collate, processor=processor),
            training_set,
            settings,
            settings.updates,
            folder,
            seed=seed,
            callbacks=[FollowTarget(student)],
            parameter_groups=[ParameterGroup(thresholds, settings.gate_learning_rate)],
            progress=progress,
        )
    learned = float(student.expected_sparsity())
    factor = student.prune()
    warnings = []
    if abs(learned - settings.sparsity) > MISSED:
        warnings.append(
            f"the gates' sparsity was {learned:.3f} at the end of their training, not {settings.sparsity:g}; all "
            f"thresholds were multiplied by {factor:.2f} to meet it (raise method.sparsity_weight or "
            "method.gate_learning_rate)"
        )
    zeros = [float((matrix.weight == 0).float().mean()) for matrix in student.matrices]
    report = CompressionReport(
        updates=settings.updates,
        batch_size=settings.batch_size,
        masked=True,
        log=[{"phase": "with gates", **entry} for entry in log],
        warnings=warnings,
        facts={
            "learned_sparsity": learned,
            "thresholds_times": factor,
            "sparsities": {m.name: z for m, z in zip(student.matrices, zeros, strict=True)},
        },
    )
    return dense, report
