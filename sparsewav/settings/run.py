"""The configuration, typed: what ``conf/`` may hold, and the ranges of its values.

Hydra fills these dataclasses; nothing else of the package sees Hydra's own objects.
"""

from dataclasses import dataclass, field, fields
from typing import Any

from sparsewav.settings.baselines import (
    METHOD_SCHEMAS,
    MISSING,
    MethodConfig,
    OptimizationConfig,
)


@dataclass
class ModelConfig:
    """Which model is pruned.

    Attributes:
        name_or_path: ``demo``, a model of the demo's cast, a folder, or a name on the hub.
        fairseq_checkpoint: a file that fairseq saved, taken in place of ``name_or_path``; None if there is none.
        offload: prune from disk with one transformer layer in memory at a time, for models that memory hardly holds.
    """

    name_or_path: str = MISSING
    fairseq_checkpoint: str | None = None
    offload: bool = False

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
    propagation: ``parallel``, ``sequential`` or ``true_sequential``.
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
    """Attributes: name: a key of :data:`sparsewav.pruning.solvers.saliency.SALIENCIES`."""

    name: str = MISSING


@dataclass
class ObsSaliency(SaliencyConfig):
    """Attributes:
    percdamp: damping as a share of the Hessian's mean diagonal.
    block_size: columns masked together.
    comparison_group: which weights compete: ``block``, ``block_quotas`` or ``matrix``.
    """

    percdamp: float = MISSING
    block_size: int = MISSING
    comparison_group: str = "block"


@dataclass
class SolverConfig:
    """Attributes: name: a key of :data:`sparsewav.pruning.solvers.solve.SOLVERS`."""

    name: str = MISSING


@dataclass
class RefitSolver(SolverConfig):
    """Attributes: tolerance: of the conjugate gradients, relative."""

    tolerance: float = MISSING


@dataclass
class AlpsSolver(RefitSolver):
    """Attributes: max_steps: of ADMM."""

    max_steps: int = MISSING


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
    """Attributes: name: ``none``, ``affine`` or ``block``."""

    name: str = MISSING


@dataclass
class ReconstructionRecovery(RecoveryConfig):
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
    level_cache_gib: memory that the pruned matrices of all levels may take; more goes to disk.
    """

    step: float = MISSING
    spread: float = MISSING
    level_cache_gib: float = MISSING


@dataclass
class ErrorCurvesAllocation(AllocationConfig):
    """Attributes:
    effect: ``output`` (measured on the model's output) or ``fisher`` (to second order, from one backward pass).
    others: ``dense`` or ``pruned``: the other matrices, while the effect of one is measured.
    utterances: how many of the calibration set the judge listens to at most.
    step: between two levels of sparsity.
    spread: how far from the target a matrix's sparsity may be.
    level_cache_gib: memory that the pruned matrices of all levels may take; more goes to disk.
    """

    effect: str = MISSING
    others: str = MISSING
    utterances: int = MISSING
    step: float = MISSING
    spread: float = MISSING
    level_cache_gib: float = MISSING


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
        update_divisor: the baselines' published numbers of updates are divided by it.
        lr_multiplier: their published learning rates are multiplied by it.
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
    update_divisor: float = 1.0
    lr_multiplier: float = 1.0
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
    "recovery/base_reconstruction": ReconstructionRecovery,
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

PLAIN = {"solver": "obs", "objective": "symmetric", "recovery": "none"}
"""The paper's choice in the groups that came later."""

COMPARISON_GROUPS = ("block", "block_quotas", "matrix")

NOT_IDENTIFYING = ("device", "tracker", "output_root", "cache", "force", "save_model", "export")
"""Keys that do not change a run's results, and so neither its folder."""


def key_names(config_type: type = Config) -> list[str]:
    """Names of the top-level keys of a schema."""
    return [item.name for item in fields(config_type)]
