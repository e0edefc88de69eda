"""The difference of two methods' word error rates, paired by seed and by utterance, with its interval."""

from dataclasses import dataclass
from pathlib import Path

import jiwer
import numpy as np
import pandas

from experiments.results import counted
from experiments.sweeps import read_predictions
from sparsewav.errors import UserError
from sparsewav.inference.bootstrap import RESAMPLES, Interval, bootstrap_difference

FEW = 10
"""With fewer seeds or speakers than this, resampling them shows less variance than there is."""


@dataclass(frozen=True)
class Edits:
    """The errors of one method.

    Attributes:
        counts: Number of edits in every utterance, shape (seeds, utterances).
        words: Number of words in every reference, shape (utterances,).
        seeds: The seed of every row.
        utterances: Id and reference of every column.
    """

    counts: np.ndarray
    words: np.ndarray
    seeds: list[int]
    utterances: list[tuple[str, str]]


def read_edits(runs: pandas.DataFrame) -> Edits:
    """Read the transcripts of runs that differ in their seeds alone.

    Raises:
        UserError: A file is damaged, or the runs were evaluated on different utterances.
    """
    runs = runs.sort_values("seed")
    counts: list[list[int]] = []
    words: list[int] = []
    utterances: list[tuple[str, str]] = []
    for run in runs["run"]:
        rows = read_predictions(Path(run))
        evaluated = [(row["id"], row["reference"]) for row in rows]
        if utterances and evaluated != utterances:
            raise UserError(f"{runs['run'].iloc[0]} and {run} were evaluated on different utterances")
        utterances = evaluated
        outputs = [jiwer.process_words(row["reference"], row["after"]) for row in rows]
        counts.append([out.substitutions + out.deletions + out.insertions for out in outputs])
        words = [out.hits + out.substitutions + out.deletions for out in outputs]
    return Edits(np.array(counts), np.array(words), runs["seed"].tolist(), utterances)


def speakers_of(ids: list[str]) -> list[str]:
    """The speaker of every utterance by ids like LibriSpeech's, ``speaker-chapter-number``; [] if one is not."""
    parts = [identifier.split("-") for identifier in ids]
    return [part[0] for part in parts] if all(len(part) == 3 for part in parts) else []


def compare(edits: Edits, baseline: Edits) -> Interval:
    """Apply :func:`bootstrap_difference` to two methods.

    Raises:
        UserError: The methods have other seeds or utterances.
    """
    if edits.seeds != baseline.seeds or edits.utterances != baseline.utterances:
        raise UserError(
            "two methods are compared with the same seeds on the same utterances alone: these have seeds "
            f"{edits.seeds} and {baseline.seeds} on {len(edits.words)} and {len(baseline.words)} utterances"
        )
    speakers = speakers_of([identifier for identifier, _ in edits.utterances])
    return bootstrap_difference(edits.counts, baseline.counts, edits.words, speakers or None)


def describe_interval(edits: Edits) -> str:
    """A sentence on what the intervals of differences are drawn over."""
    speakers = speakers_of([identifier for identifier, _ in edits.utterances])
    seeds, utterances = counted(len(edits.seeds), "seed"), counted(len(edits.words), "utterance")
    drawn = (
        f"{seeds}, {counted(len(set(speakers)), 'speaker')} and {utterances}"
        if speakers
        else f"{seeds} and {utterances}"
    )
    sentences = [
        f"Intervals: 95 %, over {RESAMPLES:,} bootstrap samples that draw {drawn} anew, paired by seed and utterance."
    ]
    if not speakers:
        sentences.append("The utterances' ids do not name speakers, which are not drawn.")
    if len(edits.seeds) == 1:
        sentences.append("With one seed the noise of the calibration is left out.")
    elif min(len(edits.seeds), len(set(speakers)) or FEW) < FEW:
        sentences.append("So few seeds or speakers make an interval too narrow rather than too wide.")
    return " ".join(sentences)
