"""The utterances of a run: read, normalized and checked before anything is computed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from sparsewav.data.batches import check_labels, check_lengths
from sparsewav.data.sets import Sets, find_overlap, refuse_unreadable
from sparsewav.data.text import Normalization, choose_normalization, normalized
from sparsewav.data.utterances import Utterance
from sparsewav.errors import UserError
from sparsewav.models.load import SpeechModel
from sparsewav.models.processor import Processor
from sparsewav.settings.pruning import Traced
from sparsewav.settings.recovery import Global
from sparsewav.settings.run import Config
from sparsewav.training.global_recovery import check_learnable


@dataclass(frozen=True)
class Chosen:
    """The utterances of a run, whose transcripts are normalized; sets that are not used are empty.

    Attributes:
        evaluation: By the names of the sets.
        calibration, training, recovery: What the smaller model is made from; the last is what ``recovery=global``
            learns from, whose transcripts are not read.
        how: What the transcripts are normalized by.
        overlap: The number of utterances of every evaluation set that are in one of the other sets, too.
        notes: Sentences for the user that belong into the record, too.
        assumed: Sentences on how the transcripts are normalized.
    """

    evaluation: dict[str, list[Utterance]]
    calibration: list[Utterance]
    training: list[Utterance]
    recovery: list[Utterance]
    how: Normalization
    overlap: dict[str, int]
    notes: list[str]
    assumed: list[str]


def on_set(name: str, evaluation: Mapping[str, object]) -> str:
    """Name an evaluation set for messages, where there are several."""
    return f" on {name}" if len(evaluation) > 1 else ""


def choose_utterances(config: Config, sets: Sets, speech: SpeechModel) -> Chosen:
    """Read and check everything that a run reads, before anything is computed."""
    data, roles = config.data, config.roles
    evaluation = sets.evaluation()
    calibration = sets.calibration(config.calibration.utterances, config.seed) if "calibration" in roles else []
    training = sets.training(config.training.seed) if "training" in roles else []
    recovery = recovery_set(config, sets)
    if config.recovers_globally:
        assert isinstance(config.recovery, Global)
        check_learnable(speech.model, config.recovery, len(recovery))
    everyone = [*chain.from_iterable(evaluation.values()), *calibration, *training, *recovery]
    refuse_unreadable(dict.fromkeys(everyone))  # sets may share utterances
    notes, overlap = sets.left_out(), {}
    for name, utterances in evaluation.items():
        called = name if len(evaluation) > 1 else "evaluation"
        overlap[name], found = find_overlap(
            data, utterances, {"calibration": [*calibration, *recovery], "training": training}, called
        )
        notes += found
    how, assumed = choose_normalization(
        (utterance.text for utterance in everyone), speech.processor.tokenizer, data.case, data.remove_characters
    )
    evaluation = {name: normalized(utterances, how) for name, utterances in evaluation.items()}
    calibration, training, recovery = (normalized(utterances, how) for utterances in (calibration, training, recovery))
    labelled = [*chain.from_iterable(evaluation.values()), *training]
    if not sets.unlabelled:
        labelled += [*calibration, *recovery]
    check_labels(list(dict.fromkeys(labelled)), speech.processor, how)
    if sets.unlabelled and not _can_be_labels([*calibration, *recovery], speech.processor, how):
        calibration, recovery = ([replace(item, text="") for item in drawn] for drawn in (calibration, recovery))
    for utterances in (*evaluation.values(), calibration, training, recovery):
        check_lengths(utterances, speech.model, speech.processor, labels=utterances is training)
    allocation = config.allocation
    with_loss = allocation.utterances if isinstance(allocation, Traced) and allocation.reads_transcripts else 0
    check_lengths(calibration[:with_loss], speech.model, speech.processor, labels=True)
    return Chosen(evaluation, calibration, training, recovery, how, overlap, notes, assumed)


def recovery_set(config: Config, sets: Sets) -> list[Utterance]:
    """Give what ``recovery=global`` learns from, out of the calibration subset; nothing where it is not chosen."""
    if not config.recovers_globally:
        return []
    assert isinstance(config.recovery, Global)
    return sets.calibration(config.recovery.utterances, config.seed, fewer=True)


def leave_unlabelled(config: Config, sets: Sets) -> None:
    """Let the calibration set have no transcripts where a run reads none of them."""
    if not config.allocation.reads_transcripts:
        sets.leave_calibration_unlabelled(role for role in config.roles if role != "calibration")


def _can_be_labels(utterances: Sequence[Utterance], processor: Processor, how: Normalization) -> bool:
    try:
        check_labels(list(dict.fromkeys(utterances)), processor, how)
    except UserError:
        return False
    return True
