"""What is to be done to the matrices of a model, and what was done."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparsewav.pruning.allocation.parts import parts_kept
from sparsewav.pruning.allocation.rank import rank_by_sensitivity
from sparsewav.pruning.allocation.sensitivity import Trace
from sparsewav.pruning.encoder import PrunableMatrix
from sparsewav.pruning.recovery import LayerRecovery
from sparsewav.pruning.report import MatrixReport
from sparsewav.pruning.solvers.quantize import QuantizedMatrix, quantize_matrices
from sparsewav.pruning.solvers.solve import MatrixGroup, PrunedMatrix, prune_groups
from sparsewav.pruning.structure import FrontEnd, Structure
from sparsewav.pruning.structured import StructureReport, as_pruned, remove_parts
from sparsewav.settings.pruning import Asymmetric, Pruning
from sparsewav.settings.quantization import Integers

BATCHED_DEVICES = ("cuda",)
"""Types of device on which matrices of equally wide inputs are solved together."""


@dataclass
class Plan:
    """What is to be done to the matrices.

    Attributes:
        settings: The settings of the pruning.
        targets: The sparsity of every matrix that is pruned, by name.
        structures: What loses parts whole, by the name of the matrix that reads them, whose sparsity is the share of
            them that is removed; None where single weights are removed, from all prunable matrices.
        front: The front end, if it loses channels; its sparsity is under its own name.
        traces: The Hessian traces that the allocation used.
        masks: The masks already in force, by name.
        covariances: The covariance of the gradients at the output of every matrix and layer, by name, where the solver
            or the recovery weights the errors of the outputs by it.
        bits: The bits of every matrix, by name; empty where the weights are not rounded to whole numbers.
        rounds: Whether the matrices are to be rounded now; otherwise their bits are only reported.
        keep_masks: Whether the outcome is to hold the masks, a byte for every weight.
        batched_devices: Types of device on which matrices whose inputs are equally wide are solved in one batch.
    """

    settings: Pruning
    targets: dict[str, float]
    traces: Mapping[str, Trace] | None = None
    masks: Mapping[str, Bool[Tensor, "_rows _cols"]] = field(default_factory=dict)
    bits: Mapping[str, float] = field(default_factory=dict)
    rounds: bool = True
    keep_masks: bool = True
    batched_devices: tuple[str, ...] = BATCHED_DEVICES
    structures: Mapping[str, Structure] | None = None
    front: FrontEnd | None = None
    covariances: Mapping[str, Float[Tensor, "_rows _rows"]] = field(default_factory=dict)

    def pruned(self, matrices: list[PrunableMatrix]) -> list[PrunableMatrix]:
        """Give those of some prunable matrices that the solver changes."""
        return [matrix for matrix in matrices if self.structures is None or matrix.name in self.structures]

    @property
    def channels_kept(self) -> int:
        """How many channels the widest convolution of the front end keeps."""
        assert self.front is not None
        return max(parts_kept(self.targets[self.front.name], self.front.count), 1)

    @cached_property
    def ranks(self) -> dict[str, int]:
        """The rank of every matrix by sensitivity; empty without traces."""
        return rank_by_sensitivity({name: trace.sensitivity for name, trace in (self.traces or {}).items()})

    def group(
        self,
        matrices: list[PrunableMatrix],
        sparsities: list[float],
        hessian: Float[Tensor, "cols cols"],
        drift: Float[Tensor, "cols cols"] | None = None,
    ) -> MatrixGroup:
        """Put together matrices that read the same input, each with its sparsity."""
        objective = self.settings.objective
        return MatrixGroup(
            weights=[matrix.weight for matrix in matrices],
            hessian=hessian,
            sparsities=sparsities,
            keeps=[self.masks.get(matrix.name) for matrix in matrices],
            drift=objective.strength * drift if isinstance(objective, Asymmetric) and drift is not None else None,
            names=[matrix.name for matrix in matrices],
            covariances=[self.covariances[matrix.name] for matrix in matrices]
            if self.settings.solver.weights_outputs
            else None,
        )

    def quantize(
        self, names: list[str], weights: list[Tensor], keeps: list[Tensor], hessian: Float[Tensor, "cols cols"]
    ) -> list[QuantizedMatrix]:
        """Round matrices that read the same input to their bits; the model is not changed."""
        quantization = self.settings.quantization
        assert isinstance(quantization, Integers)
        return quantize_matrices(
            weights,
            hessian,
            quantization,
            [self.bits[name] for name in names],
            keeps=keeps,
            damping=self.settings.solver.damping,
            names=names,
        )

    def solve_levels(
        self, matrices: list[PrunableMatrix], hessian: Float[Tensor, "cols cols"], sparsities: list[float]
    ) -> list[PrunedMatrix]:
        """Prune matrices that read the same input, each to its own sparsity; the model is not changed.

        Where parts are removed whole it is one matrix, at several sparsities.
        """
        if self.structures is not None:
            structure = self.structures[matrices[0].name]
            counts = [parts_kept(sparsity, structure.count) for sparsity in sparsities]
            removals = remove_parts(structure, hessian, counts, self.settings.solver.damping)
            return [as_pruned(structure, removal) for removal in removals]
        return prune_groups([self.group(matrices, sparsities, hessian)], self.settings)[0]


@dataclass
class Outcome:
    """The results for the matrices pruned so far.

    Attributes:
        reports: A report of every matrix, by name.
        masks: The masks, True where a weight is kept; empty without ``keep_masks``.
        structures: A report of every structure that has lost parts, by the name of the matrix that reads them.
        kept: The indices of the parts of it that stay, by its own name.
        recoveries: What the recovery of every layer achieved.
        seconds: The seconds spent in the stages ``solve``, ``recover`` and ``quantize``.
    """

    reports: dict[str, MatrixReport] = field(default_factory=dict)
    masks: dict[str, Bool[Tensor, "_rows _cols"]] = field(default_factory=dict)
    structures: dict[str, StructureReport] = field(default_factory=dict)
    kept: dict[str, Int[Tensor, " _kept"]] = field(default_factory=dict)
    recoveries: list[LayerRecovery] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("solve", "recover", "quantize"), 0.0))

    @contextmanager
    def timing(self, stage: str) -> Iterator[None]:
        """Add the seconds that a block takes to a stage, but for those of the stages within it."""
        started, before = time.perf_counter(), sum(self.seconds.values())
        yield
        self.seconds[stage] += time.perf_counter() - started - (sum(self.seconds.values()) - before)
