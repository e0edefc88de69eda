"""Validation: every value of a configuration is looked at before anything is loaded; all faults are told at once."""

import re
from collections.abc import Iterable, Iterator

from sparsewav.errors import UserError
from sparsewav.settings.baselines import OURS, at_least, one_of, optimization_faults
from sparsewav.settings.run import (
    COMPARISON_GROUPS,
    AlpsSolver,
    AsymmetricObjective,
    Config,
    ErrorCurvesAllocation,
    HawqAllocation,
    HutchinsonAllocation,
    ObsSaliency,
    OnePassStrategy,
    ProgressiveStrategy,
    ReconstructionRecovery,
    RefitSolver,
    SearchAllocation,
    TracedAllocation,
    TrainConfig,
    TrainingConfig,
)

PROPAGATIONS = ("parallel", "sequential", "true_sequential")


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
        if config.saliency.comparison_group not in COMPARISON_GROUPS:
            yield (
                f"saliency.comparison_group={config.saliency.comparison_group} does not exist; choose one of "
                f"{', '.join(COMPARISON_GROUPS)}"
            )
        stray = config.n_m or config.model.offload or config.solver.name == "alps"
        if config.saliency.comparison_group != "block" and stray:
            yield (
                f"saliency.comparison_group={config.saliency.comparison_group} goes with none of sparsity=n_m, "
                "model.offload=true and solver=alps; choose block with them"
            )
    yield from one_of(PROPAGATIONS, propagation=config.calibration.propagation, prefix="calibration.")
    yield from _accuracy_faults(config)
    yield from one_of(("dense", "bitmask"), format=config.export.format, prefix="export.")
    yield from one_of(("model", "float16"), dtype=config.export.dtype, prefix="export.")
    if config.model.offload:
        if config.calibration.propagation != "sequential" or allocation.name != "uniform":
            yield (
                "model.offload=true goes from layer to layer and never has the whole model's gradients; choose "
                "calibration.propagation=sequential and allocation=uniform with it"
            )
        if config.finetune_strategy.name != "none":
            yield "model.offload=true cannot tune, which takes the whole model; choose finetune_strategy=none with it"
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
        yield from at_least(1, max_steps=solver.max_steps, prefix="solver.")
    if isinstance(objective, AsymmetricObjective) and not 0 <= objective.strength <= 1:
        yield f"objective.strength={objective.strength:g} is not between 0 and 1"
    if isinstance(recovery, ReconstructionRecovery):
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
    two_models += [f"recovery={recovery.name}"] if recovery.name != "none" else []
    for choice in two_models:
        if config.calibration.propagation == "parallel":
            yield (
                f"{choice} needs what the pruned layers give; choose calibration.propagation=true_sequential (or "
                "sequential) with it"
            )
        if config.model.offload:
            yield f"model.offload=true has one layer in memory, and {choice} takes two; drop one of them"


def _allocation_faults(config: Config, target: float | None) -> Iterator[str]:
    from sparsewav.pruning.allocation.rank import largest_alpha  # not at the top: --help does not wait for PyTorch

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
        yield from at_least(0, level_cache_gib=allocation.level_cache_gib, prefix="allocation.")


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
    if config.update_divisor < 1:
        yield (
            f"update_divisor={config.update_divisor:g} must be at least 1, which trains a baseline as long as published"
        )
    if config.lr_multiplier <= 0:
        yield f"lr_multiplier={config.lr_multiplier:g} must be above 0; 1 takes a baseline's published learning rates"
    if config.method.name == OURS:
        return
    if config.finetune_strategy.name == "progressive":
        yield (
            f"finetune_strategy=progressive goes with method={OURS} alone; choose one_pass, which makes as many updates"
        )
    if config.model.offload:
        yield f"model.offload=true goes with method={OURS} alone"
    if config.training.processes != 1 and config.finetune_strategy.name != "none":
        yield f"training.processes={config.training.processes} goes with method={OURS} alone; choose 1"
    if config.n_m:
        yield f"sparsity=n_m goes with method={OURS} alone; choose sparsity=unstructured"
    yield from config.method.faults()


def _device_faults(device: str) -> Iterator[str]:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        yield f"device={device} is not known; choose auto, cpu, cuda or cuda:1"
