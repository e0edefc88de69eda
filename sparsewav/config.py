"""The configuration, typed: what ``conf/`` may hold, and the ranges of its values.

Hydra fills these dataclasses; nothing else of the package sees Hydra's own objects.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any

from sparsewav.config_methods import (
    METHOD_SCHEMAS,
    MISSING,
    OURS,
    MethodConfig,
    OptimizationConfig,
    at_least,
    one_of,
    optimization_faults,
)
from sparsewav.errors import UserError


@dataclass
class ModelConfig:
    """Which model is pruned.

    Attributes:
        name_or_path: ``demo``, a model of the demo's cast, a folder, or a name on the hub.
        fairseq_checkpoint: a file that fairseq saved, taken in place of ``name_or_path``; None if there is none.
        stream: prune from disk with one transformer layer in memory at a time, for models that memory hardly holds.
    """

    name_or_path: str = MISSING
    fairseq_checkpoint: str | None = None
    stream: bool = False

    @property
    def source(self) -> str:
        """What the model is loaded from, as the user named it."""
        return self.fairseq_checkpoint or self.name_or_path


@dataclass
class DataConfig:
    """Which utterances are read.

    Attributes:
        calibration_subset: where the calibration sample is drawn from.
        evaluation_subset: what the word error rate is measured on.
        training_subset: what fine-tuning and ``sparsewav-train`` learn from.
        development_subset: what ``sparsewav-train`` logs its word error rate on.
        evaluation_utterances: read only so many of the evaluation subset, the first ones; None for all.
        training_utterances: learn from a random sample of so many of the training subset; None for all.
    """

    calibration_subset: str = MISSING
    evaluation_subset: str = MISSING
    training_subset: str = MISSING
    development_subset: str = MISSING
    evaluation_utterances: int | None = None
    training_utterances: int | None = None


@dataclass
class DemoData(DataConfig):
    """Attributes: seed: of sentences, voices and noise."""

    seed: int = 0


@dataclass
class LibriSpeechFolder(DataConfig):
    """Attributes: root: folder that holds the subsets."""

    root: str = MISSING


@dataclass
class LibriSpeechHub(DataConfig):
    """``openslr/librispeech_asr``; subsets are ``configuration/split``."""


@dataclass
class CalibrationConfig:
    """Attributes:
    utterances: size of the random sample.
    propagation: ``parallel``, ``sequential`` or ``stepwise``.
    frames_per_column: of a matrix's inputs a random sample of so many frames for each of its columns; None for all.
    """

    utterances: int = MISSING
    propagation: str = MISSING
    frames_per_column: float | None = MISSING


@dataclass
class SparsityConfig:
    """How many weights go; see the two kinds below."""


@dataclass
class UnstructuredSparsity(SparsityConfig):
    """Attributes: target: share of the prunable weights, 0 to 1."""

    target: float = MISSING


@dataclass
class PatternSparsity(SparsityConfig):
    """Attributes: n, m: n of every m consecutive weights stay."""

    n: int = MISSING
    m: int = MISSING


@dataclass
class SaliencyConfig:
    """Attributes: name: a key of :data:`sparsewav.pruning.saliency.SALIENCIES`."""

    name: str = MISSING


@dataclass
class ObsSaliency(SaliencyConfig):
    """Attributes:
    percdamp: damping as a share of the Hessian's mean diagonal.
    block_size: columns masked together.
    compared_within: which weights compete: ``block``, ``block_quotas`` or ``matrix``.
    """

    percdamp: float = MISSING
    block_size: int = MISSING
    compared_within: str = "block"


@dataclass
class SolverConfig:
    """Attributes: name: a key of :data:`sparsewav.pruning.solver.SOLVERS`."""

    name: str = MISSING


@dataclass
class RefitSolver(SolverConfig):
    """Attributes: tolerance: of the conjugate gradients, relative."""

    tolerance: float = MISSING


@dataclass
class AlpsSolver(RefitSolver):
    """Attributes: most_steps: of ADMM."""

    most_steps: int = MISSING


@dataclass
class ObjectiveConfig:
    """Attributes: name: ``symmetric`` or ``asymmetric``."""

    name: str = MISSING


@dataclass
class AsymmetricObjective(ObjectiveConfig):
    """Attributes: strength: how much of the inputs' drift is made up for, 0 to 1."""

    strength: float = MISSING


@dataclass
class RecoveryConfig:
    """Attributes: name: ``none`` or ``block``."""

    name: str = MISSING


@dataclass
class BlockRecovery(RecoveryConfig):
    """Attributes:
    steps: of every layer.
    learning_rate: at the first step.
    """

    steps: int = MISSING
    learning_rate: float = MISSING


@dataclass
class AllocationConfig:
    """Attributes: name: ``uniform``, ``hutchinson``, ``hawq``, ``error_curves`` or ``search``."""

    name: str = MISSING


@dataclass
class TracedAllocation(AllocationConfig):
    """Attributes:
    probes: random vectors for every calibration batch.
    distribution: ``gaussian`` or ``rademacher``.
    utterances: how many of the calibration set at most.
    rank_tolerance: stop once a matrix is expected to be out of place by no more than this share of all ranks.
    """

    probes: int = MISSING
    distribution: str = MISSING
    utterances: int = MISSING
    rank_tolerance: float = MISSING


@dataclass
class HutchinsonAllocation(TracedAllocation):
    """Attributes:
    alpha: half the range of sparsities.
    exact_budget: meet the target to one weight.
    """

    alpha: float = MISSING
    exact_budget: bool = MISSING


@dataclass
class HawqAllocation(TracedAllocation):
    """Attributes:
    step: between two levels of sparsity.
    spread: how far from the target a matrix's sparsity may be.
    library_gigabytes: memory that the pruned matrices of all levels may take; more goes to disk.
    """

    step: float = MISSING
    spread: float = MISSING
    library_gigabytes: float = MISSING


@dataclass
class ErrorCurvesAllocation(AllocationConfig):
    """Attributes:
    effect: ``output`` (measured on the model's output) or ``fisher`` (to second order, from one backward pass).
    others: ``dense`` or ``pruned``: the other matrices, while the effect of one is measured.
    utterances: how many of the calibration set the judge listens to at most.
    step: between two levels of sparsity.
    spread: how far from the target a matrix's sparsity may be.
    library_gigabytes: memory that the pruned matrices of all levels may take; more goes to disk.
    """

    effect: str = MISSING
    others: str = MISSING
    utterances: int = MISSING
    step: float = MISSING
    spread: float = MISSING
    library_gigabytes: float = MISSING


@dataclass
class SearchAllocation(ErrorCurvesAllocation):
    """Attributes: evaluations: swaps of levels that the model's output judges."""

    evaluations: int = MISSING


@dataclass
class FinetuneStrategyConfig:
    """Attributes: name: ``none``, ``one_pass`` or ``progressive``."""

    name: str = MISSING


@dataclass
class OnePassStrategy(FinetuneStrategyConfig):
    """Attributes: more_when_sparser: ``training.epochs`` holds up to 50 %; above, it grows as 1 / (1 - sparsity)."""

    more_when_sparser: bool = MISSING


@dataclass
class ProgressiveStrategy(OnePassStrategy):
    """Attributes:
    stages: sparsities below the target at which to stop and tune, rising.
    same_updates: the stages share the updates that ``one_pass`` would make; otherwise each stage gets its own.
    """

    stages: list[float] = MISSING
    same_updates: bool = MISSING


@dataclass
class TrainingConfig(OptimizationConfig):
    """How long and how fast to train for recognition; the rest of the keys is :class:`OptimizationConfig`'s.

    Attributes:
        epochs: passes over the training set.
        processes: of a run's fine-tuning, on this machine; one for each GPU. (``sparsewav-train`` takes torchrun's.)
        freeze_feature_encoder: leave the convolutions as they are.
        seed: of initialisation, order and dropout.
    """

    epochs: float = MISSING
    processes: int = MISSING
    freeze_feature_encoder: bool = MISSING
    seed: int = MISSING


@dataclass
class TrackerConfig:
    """Attributes: name: ``none`` or ``wandb``."""

    name: str = MISSING


@dataclass
class WandbTracker(TrackerConfig):
    """Attributes: project, entity, group, mode: as ``wandb.init`` takes them; None leaves its own default."""

    project: str = MISSING
    entity: str | None = None
    group: str | None = None
    mode: str | None = None


@dataclass
class ExportConfig:
    """In which format the pruned model is written beside the plain checkpoint ``model/``.

    Attributes:
        format: ``bitmask`` writes a bit for every weight and the values that are kept; ``dense`` all of them.
        dtype: ``model`` keeps the numbers as they are, ``float16`` rounds them.
    """

    format: str = "dense"
    dtype: str = "model"


@dataclass
class Config:
    """One run.

    Attributes:
        training: of the fine-tuning, if the strategy wants it.
        method: ours, or a baseline; for a baseline sparsity, saliency and allocation decide no more than how long the
            fine-tuning is, so that it is as long as ours.
        shorten: the baselines' published numbers of updates are divided by it.
        quicken: their published learning rates are multiplied by it.
        seed: of the calibration sample and the Hutchinson probes; of a baseline's new weights and order.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``.
        seconds_per_batch: most audio in one batch.
        output_root: folder of the runs' folders.
        cache: keep Hessians, sensitivities and the dense word error rate between runs.
        force: redo a run that is done.
        save_model: keep the pruned model; a sweep of hundreds of runs may do without.
        export: what is written beside it.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    sparsity: SparsityConfig = field(default_factory=SparsityConfig)
    saliency: SaliencyConfig = field(default_factory=SaliencyConfig)
    solver: SolverConfig = field(default_factory=SolverConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    recovery: RecoveryConfig = field(default_factory=RecoveryConfig)
    allocation: AllocationConfig = field(default_factory=AllocationConfig)
    finetune_strategy: FinetuneStrategyConfig = field(default_factory=FinetuneStrategyConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    shorten: float = 1.0
    quicken: float = 1.0
    seed: int = 0
    device: str = "auto"
    seconds_per_batch: float = 60.0
    output_root: str = "outputs"
    cache: bool = True
    force: bool = False
    save_model: bool = True
    export: ExportConfig = field(default_factory=ExportConfig)

    @property
    def target_sparsity(self) -> float:
        """Share of the prunable weights to remove."""
        if isinstance(self.sparsity, PatternSparsity):
            return 1 - self.sparsity.n / self.sparsity.m
        assert isinstance(self.sparsity, UnstructuredSparsity)
        return self.sparsity.target

    @property
    def n_m(self) -> tuple[int, int] | None:
        """The pattern n:m, if there is one."""
        return (self.sparsity.n, self.sparsity.m) if isinstance(self.sparsity, PatternSparsity) else None

    @property
    def sparsity_name(self) -> str:
        """``0.75`` or ``2:4``."""
        return f"{self.n_m[0]}:{self.n_m[1]}" if self.n_m else f"{self.target_sparsity:g}"

    @property
    def stages(self) -> list[float]:
        """Sparsities at which the model is pruned, one after the other; the last is the target."""
        strategy = self.finetune_strategy
        early = strategy.stages if isinstance(strategy, ProgressiveStrategy) else []
        return [*(stage for stage in early if stage < self.target_sparsity), self.target_sparsity]


@dataclass
class TrainConfig:
    """One training of a dense model.

    Attributes:
        architecture: ``model_type`` and whatever that configuration of transformers takes; empty for that of
            ``initial_model``.
        initial_model: model whose parameters are taken over wherever name and shape agree; None to start from nothing.
        output: folder of the trained model.
        device: ``auto``, ``cpu`` or ``cuda``.
    """

    data: DataConfig = field(default_factory=DataConfig)
    architecture: dict[str, Any] = field(default_factory=dict)
    initial_model: str | None = None
    training: TrainingConfig = field(default_factory=TrainingConfig)
    output: str = "outputs/demo-model"
    device: str = "auto"


SCHEMAS: dict[str, type] = {
    "schema": Config,
    "train_schema": TrainConfig,
    "model/base_model": ModelConfig,
    "data/base_demo": DemoData,
    "data/base_librispeech_dir": LibriSpeechFolder,
    "data/base_librispeech": LibriSpeechHub,
    "calibration/base_calibration": CalibrationConfig,
    "sparsity/base_unstructured": UnstructuredSparsity,
    "sparsity/base_n_m": PatternSparsity,
    "saliency/base_score": SaliencyConfig,
    "saliency/base_obs": ObsSaliency,
    "solver/base_sweep": SolverConfig,
    "solver/base_refit": RefitSolver,
    "solver/base_alps": AlpsSolver,
    "objective/base_symmetric": ObjectiveConfig,
    "objective/base_asymmetric": AsymmetricObjective,
    "recovery/base_no_recovery": RecoveryConfig,
    "recovery/base_block": BlockRecovery,
    "allocation/base_uniform": AllocationConfig,
    "allocation/base_hutchinson": HutchinsonAllocation,
    "allocation/base_hawq": HawqAllocation,
    "allocation/base_error_curves": ErrorCurvesAllocation,
    "allocation/base_search": SearchAllocation,
    "finetune_strategy/base_none": FinetuneStrategyConfig,
    "finetune_strategy/base_one_pass": OnePassStrategy,
    "finetune_strategy/base_progressive": ProgressiveStrategy,
    "training/base_training": TrainingConfig,
    "tracker/base_no_tracker": TrackerConfig,
    "tracker/base_wandb": WandbTracker,
    **METHOD_SCHEMAS,
}
"""Where Hydra's configuration store gets each schema; the YAML files in ``conf/`` start from them."""

PLAIN = {"solver": "obs_sweep", "objective": "symmetric", "recovery": "none"}
"""The paper's choice in the groups that came later."""

COMPARED_WITHIN = ("block", "block_quotas", "matrix")

NOT_IDENTIFYING = ("device", "tracker", "output_root", "cache", "force", "save_model", "export")
"""Keys that do not change a run's results, and so neither its folder."""


def validate(config: Config) -> None:
    """Check every range before anything is loaded.

    Raises:
        UserError: with one line for every fault.
    """
    _refuse(_faults(config))


def _refuse(faults: Iterable[str]) -> None:
    lines = list(faults)
    if lines:
        raise UserError("\n".join(lines))


def _faults(config: Config) -> Iterator[str]:
    target: float | None = None
    if config.n_m:
        n, m = config.n_m
        if not 0 < n < m:
            yield f"sparsity.n={n} and sparsity.m={m} make no pattern; choose 0 < n < m, e.g. 2 and 4"
        if config.allocation.name != "uniform":
            yield f"sparsity=n_m gives every matrix the sparsity of {n}:{m}; choose allocation=uniform with it"
    else:
        target = config.target_sparsity
        if not 0 <= target <= 1:
            yield f"sparsity.target={target:g} is not between 0 and 1; 0.75 removes three weights of four"
            target = None
    allocation = config.allocation
    yield from _allocation_faults(config, target)
    if isinstance(config.saliency, ObsSaliency):
        yield from at_least(0, percdamp=config.saliency.percdamp, prefix="saliency.")
        yield from at_least(1, block_size=config.saliency.block_size, prefix="saliency.")
        if config.saliency.compared_within not in COMPARED_WITHIN:
            yield (
                f"saliency.compared_within={config.saliency.compared_within} does not exist; choose one of "
                f"{', '.join(COMPARED_WITHIN)}"
            )
        stray = config.n_m or config.model.stream or config.solver.name == "alps"
        if config.saliency.compared_within != "block" and stray:
            yield (
                f"saliency.compared_within={config.saliency.compared_within} goes with none of sparsity=n_m, "
                "model.stream=true and solver=alps; choose block with them"
            )
    if config.calibration.propagation not in ("parallel", "sequential", "stepwise"):
        yield f"calibration.propagation={config.calibration.propagation} is none of parallel, sequential and stepwise"
    yield from _accuracy_faults(config)
    yield from one_of(("dense", "bitmask"), format=config.export.format, prefix="export.")
    yield from one_of(("model", "float16"), dtype=config.export.dtype, prefix="export.")
    if config.model.stream:
        if config.calibration.propagation != "sequential" or allocation.name != "uniform":
            yield (
                "model.stream=true goes from layer to layer and never has the whole model's gradients; choose "
                "calibration.propagation=sequential and allocation=uniform with it"
            )
        if config.finetune_strategy.name != "none":
            yield "model.stream=true cannot tune, which takes the whole model; choose finetune_strategy=none with it"
    yield from at_least(1, utterances=config.calibration.utterances, prefix="calibration.")
    if config.calibration.frames_per_column is not None:
        yield from at_least(1, frames_per_column=config.calibration.frames_per_column, prefix="calibration.")
    if config.data.evaluation_utterances is not None:
        yield from at_least(1, evaluation_utterances=config.data.evaluation_utterances, prefix="data.")
    if isinstance(config.finetune_strategy, OnePassStrategy):
        yield from _finetune_faults(config, config.finetune_strategy, target)
    if config.seconds_per_batch <= 0:
        yield f"seconds_per_batch={config.seconds_per_batch:g} must be above 0"
    yield from _method_faults(config)
    yield from at_least(0, seed=config.seed)
    yield from _device_faults(config.device)


def _accuracy_faults(config: Config) -> Iterator[str]:
    """Of solver, objective and recovery."""
    solver, objective, recovery = config.solver, config.objective, config.recovery
    if isinstance(solver, RefitSolver) and not 0 < solver.tolerance < 1:
        yield f"solver.tolerance={solver.tolerance:g} must be above 0 and below 1, e.g. 1e-4"
    if isinstance(solver, AlpsSolver):
        yield from at_least(1, most_steps=solver.most_steps, prefix="solver.")
    if isinstance(objective, AsymmetricObjective) and not 0 <= objective.strength <= 1:
        yield f"objective.strength={objective.strength:g} is not between 0 and 1"
    if isinstance(recovery, BlockRecovery):
        yield from at_least(1, steps=recovery.steps, prefix="recovery.")
        if recovery.learning_rate <= 0:
            yield f"recovery.learning_rate={recovery.learning_rate:g} must be above 0"
    updating = [f"solver={solver.name}"] if isinstance(solver, RefitSolver) else []
    two_models = [f"objective={objective.name}"] if isinstance(objective, AsymmetricObjective) else []
    if not isinstance(config.saliency, ObsSaliency):
        for choice in updating + two_models:
            yield (
                f"{choice} updates the kept weights, and saliency={config.saliency.name} does not; choose saliency=obs "
                "or obs_first_order with it"
            )
    two_models += [f"recovery={recovery.name}"] if isinstance(recovery, BlockRecovery) else []
    for choice in two_models:
        if config.calibration.propagation == "parallel":
            yield (
                f"{choice} needs what the pruned layers give; choose calibration.propagation=stepwise (or sequential) "
                "with it"
            )
        if config.model.stream:
            yield f"model.stream=true has one layer in memory, and {choice} takes two; drop one of them"


def _allocation_faults(config: Config, target: float | None) -> Iterator[str]:
    from sparsewav.pruning.allocation import largest_alpha  # not at the top: --help does not wait for PyTorch

    allocation = config.allocation
    if (
        isinstance(allocation, HutchinsonAllocation)
        and target is not None
        and not (0 <= allocation.alpha <= min(target, 1 - target) + 1e-9)
    ):
        yield (
            f"allocation.alpha={allocation.alpha:g} does not fit sparsity.target={target:g}: matrices would get "
            f"{target - allocation.alpha:g} to {target + allocation.alpha:g}; "
            f"choose an alpha from 0 to {largest_alpha(target):g}"
        )
    if isinstance(allocation, TracedAllocation):
        if allocation.distribution not in ("gaussian", "rademacher"):
            yield f"allocation.distribution={allocation.distribution} is neither gaussian nor rademacher"
        yield from at_least(1, probes=allocation.probes, utterances=allocation.utterances, prefix="allocation.")
        yield from at_least(0, rank_tolerance=allocation.rank_tolerance, prefix="allocation.")
    if isinstance(allocation, ErrorCurvesAllocation):
        if allocation.effect not in ("output", "fisher"):
            yield f"allocation.effect={allocation.effect} is neither output nor fisher"
        if allocation.others not in ("dense", "pruned"):
            yield f"allocation.others={allocation.others} is neither dense nor pruned"
        yield from at_least(1, utterances=allocation.utterances, prefix="allocation.")
    if isinstance(allocation, SearchAllocation):
        yield from at_least(1, evaluations=allocation.evaluations, prefix="allocation.")
    if isinstance(allocation, HawqAllocation | ErrorCurvesAllocation):
        if not 0 < allocation.step <= allocation.spread <= 1:
            yield (
                f"allocation.step={allocation.step:g} and allocation.spread={allocation.spread:g} do not fit: they "
                "must be 0 < step <= spread <= 1"
            )
        yield from at_least(0, library_gigabytes=allocation.library_gigabytes, prefix="allocation.")


def validate_training(config: TrainConfig) -> None:
    """Check every range before anything is loaded.

    Raises:
        UserError: with one line for every fault.
    """
    _refuse(_training_faults(config))


def _training_faults(config: TrainConfig) -> Iterator[str]:
    if not config.architecture and config.initial_model is None:
        yield "architecture is empty; choose one (architecture=demo), or name the initial_model whose it is to be"
    if config.data.training_utterances is not None:
        yield from at_least(1, training_utterances=config.data.training_utterances, prefix="data.")
    yield from _schedule_faults(config.training)
    yield from _device_faults(config.device)


def _finetune_faults(config: Config, strategy: OnePassStrategy, target: float | None) -> Iterator[str]:
    if config.n_m:
        yield f"finetune_strategy={strategy.name} wants a share of the weights; choose sparsity=unstructured with it"
    if strategy.more_when_sparser and target == 1:
        yield "sparsity.target=1 leaves nothing to tune; choose finetune_strategy=none"
    if isinstance(strategy, ProgressiveStrategy):
        stages = strategy.stages
        if any(not 0 < stage < 1 for stage in stages) or stages != sorted(set(stages)):
            yield (
                f"finetune_strategy.stages={stages} must rise, each between 0 and 1; the paper's are [0.7, 0.8, 0.9]"
            )
        allocation = config.allocation
        for stage in stages:
            if isinstance(allocation, HutchinsonAllocation) and not allocation.alpha <= min(stage, 1 - stage) + 1e-9:
                yield f"allocation.alpha={allocation.alpha:g} does not fit {stage:g} of finetune_strategy.stages"
    if config.data.training_utterances is not None:
        yield from at_least(1, training_utterances=config.data.training_utterances, prefix="data.")
    yield from _schedule_faults(config.training)


def _schedule_faults(training: TrainingConfig) -> Iterator[str]:
    yield from at_least(0, seed=training.seed, prefix="training.")
    if training.epochs <= 0:
        yield f"training.epochs={training.epochs:g} must be above 0"
    yield from optimization_faults(training, "training.", training.processes)


def _method_faults(config: Config) -> Iterator[str]:
    if config.shorten < 1:
        yield f"shorten={config.shorten:g} must be at least 1, which trains a baseline as long as published"
    if config.quicken <= 0:
        yield f"quicken={config.quicken:g} must be above 0; 1 takes a baseline's published learning rates"
    if config.method.name == OURS:
        return
    if config.finetune_strategy.name == "progressive":
        yield (
            f"finetune_strategy=progressive goes with method={OURS} alone; choose one_pass, which makes as many updates"
        )
    if config.model.stream:
        yield f"model.stream=true goes with method={OURS} alone"
    if config.training.processes != 1 and config.finetune_strategy.name != "none":
        yield f"training.processes={config.training.processes} goes with method={OURS} alone; choose 1"
    if config.n_m:
        yield f"sparsity=n_m goes with method={OURS} alone; choose sparsity=unstructured"
    yield from config.method.faults()


def _device_faults(device: str) -> Iterator[str]:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        yield f"device={device} is not known; choose auto, cpu, cuda or cuda:1"


def key_names(config_type: type = Config) -> list[str]:
    """Names of the top-level keys of a schema."""
    return [item.name for item in fields(config_type)]
