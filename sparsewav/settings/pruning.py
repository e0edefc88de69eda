"""The options of pruning: one dataclass for every choice in a group, and :class:`Pruning`, which holds one of each."""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import Any, ClassVar

from sparsewav.errors import UserError
from sparsewav.settings.options import Option, Settings, group_faults, option
from sparsewav.settings.quantization import (
    Float16,
    Int2,
    Int3,
    Int4,
    Int8,
    Mixed,
    NoQuantization,
    Quantization,
)
from sparsewav.settings.recovery import (
    Affine,
    Elsa,
    Global,
    NoRecovery,
    OutputWeighting,
    Reconstruction,
    Recovery,
)
from sparsewav.settings.sparsity import NM, Megabytes, Sparsity, Structured, Unstructured

TRANSFORMER, ENCODER = SCOPES = "transformer", "encoder"
"""What may be pruned: the matrices of the transformer layers, or those in front of the layers, too."""


@dataclass(kw_only=True)
class Saliency(Option):
    """How much the layer's output changes when a weight is removed.

    Attributes:
        updates: Whether the kept weights are updated to make up for the removed ones.
    """

    updates: ClassVar[bool] = True


@dataclass(kw_only=True)
class Magnitude(Saliency):
    """|w|, compared over the whole matrix; no weight update."""

    name: str = field(default="magnitude", init=False)
    updates: ClassVar[bool] = False


@dataclass(kw_only=True)
class Wanda(Saliency):
    """|w| ||x||, compared within each row; no weight update (Sun et al. 2023)."""

    name: str = field(default="wanda", init=False)
    updates: ClassVar[bool] = False


@dataclass(kw_only=True)
class SecondOrder(Saliency):
    """w² / [H⁻¹]_pp; the kept weights of the row are updated (eq. 1 of the paper)."""

    name: str = field(default="obs", init=False)


@dataclass(kw_only=True)
class FirstOrder(Saliency):
    """|w G| + w² / [H⁻¹]_pp; the kept weights of the row are updated (eq. 3: the paper's improved saliency)."""

    name: str = field(default="obs_first_order", init=False)


@dataclass(kw_only=True)
class Solver(Option):
    """How the mask and the kept weights of a matrix are found, given its Hessian.

    Attributes:
        uses_saliency: Whether the saliency chooses the mask.
    """

    uses_saliency: ClassVar[bool] = True
    damping: float = option(0.01, "λ as a share of the Hessian's mean diagonal", least=0)

    @property
    def weights_outputs(self) -> bool:
        """Whether the covariance of the gradients at every matrix's output is needed."""
        return False


@dataclass(kw_only=True)
class OBS(Solver):
    """The paper's: columns from left to right, each settled once it is passed (the order of SparseGPT)."""

    name: str = field(default="obs", init=False)
    block_size: int = option(128, "columns that are masked together", least=1)
    comparison_group: str = option(
        "block",
        "weights that compete: block (every block of columns loses the same share), block_quotas (a block loses its "
        "part of the matrix's lowest scores) or matrix (the matrix's lowest scores go)",
        choices=("block", "block_quotas", "matrix"),
    )


@dataclass(kw_only=True)
class OBSRefit(OBS):
    """The mask of ``obs``, and the exact least squares of every row over the weights that it keeps."""

    name: str = field(default="obs_refit", init=False)
    tolerance: float = option(1e-4, "relative tolerance of the conjugate gradients", above=0, below=1)


@dataclass(kw_only=True)
class ALPS(OutputWeighting, Solver):
    """Mask and weights together by ADMM, then the exact least squares (Meng et al. 2024); uses no saliency."""

    name: str = field(default="alps", init=False)
    uses_saliency: ClassVar[bool] = False
    tolerance: float = option(1e-4, "relative tolerance of the conjugate gradients", above=0, below=1)
    max_steps: int = option(300, "steps of ADMM at most; it stops earlier when its mask has come to rest", least=1)


@dataclass(kw_only=True)
class Objective(Option):
    """Which error of a matrix's output is minimised."""


@dataclass(kw_only=True)
class Symmetric(Objective):
    """The paper's: the same inputs before and after, min ||(W − Ŵ)X||²."""

    name: str = field(default="symmetric", init=False)


@dataclass(kw_only=True)
class Asymmetric(Objective):
    """The dense model's outputs from the pruned model's inputs, min ||WX − ŴX̂||²: makes up for earlier layers.

    What is in front of the layers (``scope=encoder``) is pruned with the symmetric one, and the first layer makes up
    for it. Where channels are removed whole, what reads them is fitted to the dense front end, whatever the strength.
    """

    name: str = field(default="asymmetric", init=False)
    strength: float = option(1.0, "share of the difference X − X̂ that is made up for; 0 is symmetric", least=0, most=1)


@dataclass(kw_only=True)
class Allocation(Option):
    """How the sparsity is shared among the matrices."""

    @property
    def reads_transcripts(self) -> bool:
        """Whether the calibration utterances need transcripts."""
        return False


@dataclass(kw_only=True)
class Uniform(Allocation):
    """Every matrix gets the same sparsity."""

    name: str = field(default="uniform", init=False)


@dataclass(kw_only=True)
class Traced(Allocation):
    """An allocation by traces of the CTC loss's Hessian (eq. 4 and 5 of the paper) or of its Fisher information."""

    trace: str = option(
        "hutchinson",
        "of the Hessian for the transcripts (hutchinson, the paper's), or of the Fisher information of the model's own "
        "transcripts (fisher: never negative, needs no labels)",
        choices=("hutchinson", "fisher"),
    )
    probes: int = option(
        1,
        "random vectors for every calibration batch, each of which costs two gradients; with trace=fisher drawn "
        "transcripts for every utterance, one gradient each",
        least=1,
    )
    distribution: str = option(
        "gaussian",
        "of the random vectors of trace=hutchinson: gaussian (the paper's), rademacher (less variance)",
        choices=("gaussian", "rademacher"),
    )
    utterances: int = option(128, "calibration utterances at most that the traces are estimated on", least=1)
    rank_tolerance: float = option(
        0.05,
        "stop once a matrix is expected to be out of place by no more than this share of all ranks; 0: never",
        least=0,
    )

    @property
    def reads_transcripts(self) -> bool:
        return self.trace == "hutchinson"

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        if self.trace == "fisher" and self.distribution != "gaussian":
            yield (
                f"distribution={self.distribution} is that of the random vectors of trace=hutchinson, and trace=fisher "
                "has none; leave it out"
            )


@dataclass(kw_only=True)
class Hutchinson(Traced):
    """The paper's mixed sparsity: s − α for the matrix that the CTC loss is most sensitive to, s + α for the least."""

    name: str = field(default="hutchinson", init=False)
    alpha: float = option(0.1, "half the range of sparsities")
    exact_budget: bool = option(False, "shift the range until the whole model has the target sparsity to one weight")


@dataclass(kw_only=True)
class Leveled(Allocation):
    """An allocation by what every matrix costs at several levels of sparsity; meets the target to one weight."""

    step: float = option(0.05, "distance between two levels of a matrix")
    spread: float = option(0.25, "largest distance of a level from the target; read beside sparsity=unstructured alone")
    level_cache_gib: float = option(
        1.0, "memory in GiB for the matrices at all levels; more goes to disk", identifies=False, least=0
    )

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        if not 0 < self.step <= self.spread <= 1:
            yield (
                f"step={self.step:g} and allocation.spread={self.spread:g} do not fit: they must be "
                "0 < step <= spread <= 1"
            )


@dataclass(kw_only=True)
class HAWQ(Leveled, Traced):
    """Mean Hessian trace times the squared change of the weights, summed and minimised (HAWQ-V2, Dong et al. 2020)."""

    name: str = field(default="hawq", init=False)


@dataclass(kw_only=True)
class ErrorCurves(Leveled):
    """The levels whose measured costs add up to the least, by dynamic programming."""

    name: str = field(default="error_curves", init=False)
    effect: str = option(
        "output",
        "output (divergence of the model's output, measured at every level) or fisher (to second order, from one "
        "backward pass)",
        choices=("output", "fisher"),
    )
    others: str = option(
        "dense", "the other matrices while one is measured: dense, or pruned to the target", choices=("dense", "pruned")
    )
    utterances: int = option(16, "calibration utterances at most that the divergence is measured on", least=1)


@dataclass(kw_only=True)
class Search(ErrorCurves):
    """``error_curves``, then a search over swaps of levels by the divergence of the model's output."""

    name: str = field(default="search", init=False)
    evaluations: int = option(400, "swaps whose divergence is measured", least=1)


@dataclass(kw_only=True)
class Calibration(Settings):
    """The sample of speech that the Hessians are summed over."""

    utterances: int = option(128, "size of the random sample", least=1)
    propagation: str = option(
        "parallel",
        "parallel (all Hessians from one pass of the dense model), sequential (layer by layer on the layers already "
        "pruned) or true_sequential (matrix by matrix within a layer, too)",
        choices=("parallel", "sequential", "true_sequential"),
    )
    frames_per_column: float | None = option(
        64.0, "random frames for every column of a Hessian; null: all frames", least=1
    )


OPTIONS: dict[str, tuple[type[Option], ...]] = {
    "sparsity": (Unstructured, NM, Megabytes, Structured),
    "saliency": (FirstOrder, SecondOrder, Wanda, Magnitude),
    "solver": (OBS, OBSRefit, ALPS),
    "objective": (Symmetric, Asymmetric),
    "recovery": (NoRecovery, Reconstruction, Affine, Global, Elsa),
    "quantization": (NoQuantization, Float16, Int8, Int4, Int3, Int2, Mixed),
    "allocation": (Hutchinson, Uniform, HAWQ, ErrorCurves, Search),
}
"""The choices of every group, the paper's first."""


def resolve(group: str, value: Any) -> Any:
    """Give the option that a user named: the object itself, its name for the defaults, or a number for a sparsity.

    Raises:
        UserError: The value is no choice of the group.
    """
    choices = {choice().name: choice for choice in OPTIONS[group]}
    if isinstance(value, str) and value in choices:
        return choices[value]()
    if group == "sparsity" and isinstance(value, Real) and not isinstance(value, bool):
        return Unstructured(float(value))
    if isinstance(value, tuple(choices.values())):
        return value
    if value in choices.values():
        raise UserError(f"{group}={value.__name__} is the class; give an object of it, {group}={value.__name__}()")
    shown = value.name if isinstance(value, Option) else value
    number = ", or give a number, e.g. 0.75" if group == "sparsity" else ""
    raise UserError(f"{group}={shown} does not exist; choose one of {', '.join(choices)}{number}")


@dataclass(kw_only=True)
class Pruning:
    """All that decides which weights are removed and what the others become."""

    sparsity: Sparsity = option(Unstructured, "how many weights are removed")
    saliency: Saliency = option(FirstOrder, "which weights are removed first")
    solver: Solver = option(OBS, "how mask and kept weights are found")
    objective: Objective = option(Symmetric, "which error is minimised")
    recovery: Recovery = option(NoRecovery, "what is left learns from the dense model afterwards")
    quantization: Quantization = option(NoQuantization, "to how few values the kept weights are rounded")
    allocation: Allocation = option(Hutchinson, "how the sparsity is shared among the matrices")
    calibration: Calibration = option(Calibration, "the sample of speech that Hessians are summed over")
    scope: str = option(
        TRANSFORMER,
        "what is pruned: transformer (the matrices of the layers; the paper's) or encoder (the convolutions and the "
        "projection in front of the layers, too; sparsities are over both then)",
        choices=SCOPES,
    )
    seed: int = option(
        0,
        "of pruning: calibration sample, frames, probes of traces and search; of a baseline's new weights and order; "
        "data.seed and training.seed do not follow it",
        least=0,
        below=2**32,
    )

    @property
    def reach(self) -> str:
        """Which matrices change and are counted: those of the scope, and without channels those in front, too."""
        channels = isinstance(self.sparsity, Structured) and "channels" in self.sparsity.parts
        return ENCODER if channels else self.scope

    @property
    def layer_recovery(self) -> Reconstruction | Affine | None:
        """What every pruned layer learns by itself."""
        if isinstance(self.recovery, Global):
            shared = {item.name: getattr(self.recovery, item.name) for item in fields(OutputWeighting)}
            return Reconstruction(steps=self.recovery.steps, **shared) if self.recovery.steps else None
        return self.recovery if isinstance(self.recovery, Reconstruction | Affine) else None

    @property
    def weights_layers(self) -> bool:
        """Whether the covariance of the gradients at every layer's output is needed."""
        return isinstance(self.layer_recovery, Reconstruction) and self.layer_recovery.weights_outputs

    @property
    def two_models(self) -> bool:
        """Whether the dense model's activations are needed beside the pruned model's, layer by layer."""
        return isinstance(self.objective, Asymmetric) or self.layer_recovery is not None

    @property
    def dense_hessians(self) -> bool:
        """Whether Hessians of the dense model's inputs are needed, whatever inputs the solver sees afterwards."""
        by_levels = isinstance(self.allocation, Leveled) or isinstance(self.sparsity, Megabytes)
        return self.calibration.propagation == "parallel" or by_levels

    @property
    def uses_saliency(self) -> bool:
        """Whether the saliency chooses what is removed."""
        return self.solver.uses_saliency and not isinstance(self.sparsity, Structured)

    def check(self) -> None:
        """Refuse values that cannot be.

        Raises:
            UserError: There are faults; it has a line for each.
        """
        lines = list(self.faults())
        if lines:
            raise UserError("\n".join(lines))

    def faults(self) -> Iterator[str]:
        """Give a sentence for every value that is out of range and for every choice that does not fit another."""
        yield from group_faults(self)
        yield from self.choice_faults()

    def choice_faults(self) -> Iterator[str]:
        """Give a sentence for every choice of one group that does not fit that of another."""
        sparsity, allocation, propagation = self.sparsity, self.allocation, self.calibration.propagation
        if sparsity.pattern and not isinstance(allocation, Uniform):
            yield f"sparsity=n_m gives every matrix the sparsity {sparsity}; choose allocation=uniform with it"
        if isinstance(sparsity, Structured):
            yield from self._structured_faults(sparsity)
        elif isinstance(allocation, Hutchinson) and sparsity.fraction is not None and not list(sparsity.faults()):
            yield from alpha_faults(allocation.alpha, sparsity.fraction)
        if isinstance(sparsity, Megabytes):
            yield from self._budget_faults()
        if isinstance(self.solver, OBS) and self.solver.comparison_group != "block" and sparsity.pattern:
            yield (
                f"solver.comparison_group={self.solver.comparison_group} does not go with sparsity=n_m; choose block"
            )
        names = {group: getattr(self, group).name for group in ("solver", "objective", "recovery")}
        beyond_paper = {group: name for group, name in names.items() if name != OPTIONS[group][0]().name}
        for group in ("solver", "objective"):
            if group in beyond_paper and not self.saliency.updates:
                yield (
                    f"{group}={names[group]} updates the kept weights, and saliency={self.saliency.name} does not; "
                    "choose saliency=obs or obs_first_order with it"
                )
        if isinstance(self.quantization, Mixed) and sparsity.name != "megabytes":
            yield (
                "quantization=mixed gives every matrix the bits that a size of the whole file leaves it; choose "
                "sparsity=megabytes with it, or the same bits for all, e.g. quantization=int4"
            )
        by_layers = {"objective": "objective" in beyond_paper, "recovery": self.layer_recovery is not None}
        for group in filter(by_layers.get, by_layers):
            if propagation == "parallel":
                yield (
                    f"{group}={names[group]} needs what the pruned layers give; choose "
                    "calibration.propagation=true_sequential (or sequential) with it"
                )
        if isinstance(self.recovery, Global) and isinstance(sparsity, Megabytes):
            yield (
                f"recovery={self.recovery.name} changes the weights whose bytes sparsity=megabytes has counted; choose "
                "recovery=reconstruction, or sparsity=unstructured"
            )
        if isinstance(self.recovery, Elsa) and (sparsity.pattern or isinstance(sparsity, Structured)):
            yield (
                f"recovery=elsa moves single weights from one matrix to another, and sparsity={sparsity.name} removes "
                "them in fixed numbers together; choose recovery=global with it"
            )

    def _structured_faults(self, sparsity: Structured) -> Iterator[str]:
        if self.scope != TRANSFORMER:
            yield (
                f"scope={self.scope} removes single weights in front of the layers, and sparsity=structured channels; "
                f"choose scope={TRANSFORMER} with it, and channels among sparsity.parts"
            )
        if isinstance(self.allocation, Traced):
            yield (
                f"allocation={self.allocation.name} shares weights, and sparsity=structured removes whole parts; "
                "choose allocation=error_curves (or search, uniform) with it"
            )
        if isinstance(self.allocation, Search) and sparsity.uniform:
            yield (
                "allocation=search swaps levels of single layers, and sparsity.uniform=true gives all the same; choose "
                "allocation=error_curves with it"
            )
        if not self.saliency.updates:
            yield (
                f"saliency={self.saliency.name} updates no weights, and sparsity=structured does; choose saliency=obs"
            )
        if self.solver.name != OBS().name or getattr(self.solver, "comparison_group", "block") != "block":
            yield (
                f"solver={self.solver.name} and its comparison_group choose single weights; choose solver=obs, whose "
                "damping sparsity=structured reads, and solver.comparison_group=block"
            )

    def _budget_faults(self) -> Iterator[str]:
        if isinstance(self.allocation, Traced):
            yield (
                f"allocation={self.allocation.name} knows no bytes, which sparsity=megabytes shares among the "
                "matrices; choose allocation=error_curves (or search, uniform) with it"
            )
        widths = self.quantization.widths
        if isinstance(self.allocation, Uniform) and len(widths) > 1:
            yield (
                f"quantization={self.quantization.name} gives every matrix its own bits, and allocation=uniform the "
                "same to all; choose allocation=error_curves, or quantization=int4, with it"
            )


def alpha_faults(alpha: float, sparsity: float) -> Iterator[str]:
    """Give a sentence if α lets a matrix have a sparsity below 0 or above 1 (eq. 6 of the paper)."""
    largest = largest_alpha(sparsity)
    if not -1e-9 <= alpha <= min(sparsity, 1 - sparsity) + 1e-9:
        yield (
            f"allocation.alpha={alpha:g} does not fit sparsity.target={sparsity:g}: matrices would get "
            f"{sparsity - alpha:g} to {sparsity + alpha:g}; choose an alpha from 0 to {largest:g}"
        )


def largest_alpha(sparsity: float) -> float:
    """Give the largest α that keeps s − α and s + α between 0 and 1, to six digits."""
    return int(min(sparsity, 1 - sparsity) * 1e6 + 1e-3) / 1e6
