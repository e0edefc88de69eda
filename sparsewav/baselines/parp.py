"""PARP: prune, adjust, prune again (Lai et al., NeurIPS 2021)."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from transformers import PreTrainedModel, TrainerState

from sparsewav.baselines.distillation import no_masking
from sparsewav.baselines.magnitude import prune_by_magnitude
from sparsewav.baselines.method import CompressionReport
from sparsewav.data.batches import collate
from sparsewav.data.utterances import Utterance
from sparsewav.models.processor import Processor
from sparsewav.pruning.encoder import freeze_front_end
from sparsewav.pruning.hessian import Progress
from sparsewav.settings.baselines import PARP
from sparsewav.training.masks import masks_of
from sparsewav.training.trainer import train


def ramp(settings: PARP, update: int) -> float | None:
    """Give the sparsity to prune to after an update (0 is the start), or None if that update is not followed by one."""
    prunes = settings.updates if settings.reprunes > settings.updates else settings.reprunes
    number, due = divmod(update * prunes, settings.updates)
    if due >= prunes:
        return None
    return settings.first_sparsity + (settings.sparsity - settings.first_sparsity) * number / prunes


def compress(
    dense: PreTrainedModel,
    processor: Processor,
    training_set: Sequence[Utterance],
    settings: PARP,
    folder: Path,
    *,
    seed: int,
    progress: Progress | None = None,
) -> tuple[PreTrainedModel, CompressionReport]:
    """Prune, train with the CTC loss while every weight may regrow, and prune again along the way and at the end.

    See :class:`~sparsewav.baselines.Method` for the arguments. ``facts`` counts the weights that were pruned first and
    are back at the end (``regrown``).
    """
    prune_by_magnitude(dense, settings.first_sparsity)
    first = masks_of(dense)
    freeze_front_end(dense)

    def prune_again(state: TrainerState) -> None:
        sparsity = ramp(settings, state.global_step)
        if sparsity is not None:  # a weight that was zero and has grown may now replace a smaller one
            prune_by_magnitude(dense, sparsity)

    with no_masking(dense):
        log = train(
            dense,
            partial(collate, processor=processor),
            training_set,
            settings,
            settings.updates,
            folder,
            seed=seed,
            after_update=prune_again,
            progress=progress,
        )
    regrown = sum(int((mask & ~first[name]).sum()) for name, mask in masks_of(dense).items())
    stuck = (
        "no weight that PARP removed came back: in so few updates, at this learning rate, none outgrew one of those "
        "that stayed; this is magnitude pruning with a training (lower update_divisor, or raise method.learning_rate)"
    )
    report = CompressionReport(
        updates=settings.updates,
        batch_size=settings.batch_size,
        masked=True,
        log=[{"phase": "prune and adjust", **entry} for entry in log],
        warnings=[] if regrown else [stuck],
        facts={"regrown": regrown, "reprunes": sum(ramp(settings, n + 1) is not None for n in range(settings.updates))},
    )
    return dense, report
