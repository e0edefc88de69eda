"""Fine-tuning strategies: at which sparsities a model is fine-tuned, and for how long (section 2.4 of the paper)."""

from dataclasses import dataclass

from sparsewav.settings.run import Config
from sparsewav.settings.training import OnePass, Progressive
from sparsewav.training.trainer import updates_of


@dataclass(frozen=True)
class Stage:
    """One stage of a run: the sparsity to prune to, and the number of optimizer steps that follow."""

    sparsity: float
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

    def updates(sparsity: float) -> int:
        growth = max(1.0, 0.5 / (1 - sparsity)) if strategy.more_when_sparser else 1.0
        return updates_of(training.epochs * growth, training_utterances, training.batch_size)

    if isinstance(strategy, Progressive) and not strategy.same_updates:
        return [Stage(sparsity, updates(sparsity)) for sparsity in config.stages]
    share, rest = divmod(updates(config.sparsity.fraction), len(config.stages))
    return [Stage(sparsity, share + (index < rest)) for index, sparsity in enumerate(config.stages)]
