"""Fine-tuning strategies: at which sparsities a model is fine-tuned, and for how long (section 2.4 of the paper)."""

from collections.abc import Sequence
from dataclasses import dataclass

from sparsewav.settings.run import Config
from sparsewav.settings.training import OnePass, Progressive, Training
from sparsewav.training.trainer import updates_of


@dataclass(frozen=True)
class Stage:
    """One stage of a run: the sparsity to prune to (None: as sizes allow), and the optimizer steps that follow."""

    sparsity: float | None
    updates: int


def plan_stages(config: Config, training_utterances: int) -> list[Stage]:
    """Plan the stages of a run for a training set of a given size.

    The paper states 40 epochs at 50 % sparsity and "more" above. Here the epochs grow as 1 / (1 − sparsity), so that
    each remaining weight costs the same. ``progressive`` divides the updates of ``one_pass`` evenly among its stages
    for a fair comparison, unless ``same_updates`` is false.
    """
    strategy, training = config.finetune_strategy, config.training
    if not isinstance(strategy, OnePass):
        return [Stage(config.sparsity.fraction, 0)]

    def updates(sparsity: float | None) -> int:
        growth = max(1.0, 0.5 / (1 - sparsity)) if strategy.more_when_sparser and sparsity is not None else 1.0
        return updates_of(training.epochs * growth, training_utterances, training.batch_size)

    if isinstance(strategy, Progressive) and not strategy.same_updates:
        return [Stage(sparsity, updates(sparsity)) for sparsity in config.stages]
    share, rest = divmod(updates(config.sparsity.fraction), len(config.stages))
    return [Stage(sparsity, share + (index < rest)) for index, sparsity in enumerate(config.stages)]


FEW_UPDATES = 100
"""A training on a small corpus that comes to fewer is rarely what was meant."""


def too_short(settings: Training, stages: Sequence[Stage], utterances: int) -> list[str]:
    """Say whether the stages come to very few updates together, or one of them to no more than its warm-up has.

    A number of epochs that is meant for tens of thousands of utterances is a handful of updates on a small corpus. On
    a large one, a pass over which takes ten times :data:`FEW_UPDATES`, few are meant, as in the demo's short preset.
    """
    updates = [stage.updates for stage in stages if stage.updates]
    if not updates:
        return []
    found = []
    one_pass = updates_of(1, utterances, settings.batch_size)
    if sum(updates) < FEW_UPDATES and one_pass < 10 * FEW_UPDATES:
        found.append(
            f"training.epochs={settings.epochs:g} comes to {sum(updates)} updates of {settings.batch_size} utterances, "
            f"as the training set has {utterances:,}, a pass over which is {one_pass} updates; raise training.epochs"
        )
    if settings.warmup_steps >= max(1, min(updates)):
        found.append(
            f"training.warmup_steps={settings.warmup_steps:g} are no fewer than the {min(updates)} updates of a "
            "training: it ends before the learning rate is up; set training.warmup_steps=0.1 or raise training.epochs"
        )
    return found
