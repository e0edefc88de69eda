"""The difference of two methods' word error rates, paired by seed and by utterance, with its interval."""

from dataclasses import dataclass
from pathlib import Path

import jiwer
import numpy as np
import pandas

from experiments.results import counted
from experiments.sweeps import read_predictions
from sparsewav.errors import UserError

RESAMPLES = 10_000
"""Bootstrap samples."""
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


def compare(edits: Edits, baseline: Edits) -> tuple[float, float, float]:
    """Apply :func:`bootstrap_difference` to two methods; it returns the difference and its interval as fractions.

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


def bootstrap_difference(
    edits: np.ndarray, baseline: np.ndarray, words: np.ndarray, speakers: list[str] | None, seed: int = 0
) -> tuple[float, float, float]:
    """Difference of two corpus word error rates with its 95 % interval over seeds, speakers and utterances.

    Every bootstrap sample draws the seeds with replacement and, independently of them, the speakers, and of every
    speaker drawn as many utterances as it has. Both methods get the same sample: the errors that they share cancel out.

    Args:
        edits: Number of edits with every seed in every utterance, shape (seeds, utterances).
        baseline: The same of the other method, with the same seeds.
        words: Number of words in every reference, shape (utterances,).
        speakers: The speaker of every utterance; None to draw the utterances without regard to them.
        seed: Seed of the resampling.

    Returns:
        Difference (fraction), and its 2.5 % and 97.5 % quantiles over :data:`RESAMPLES` samples.
    """
    generator = np.random.default_rng(seed)
    difference = edits - baseline
    of_speaker = pandas.factorize(np.array(speakers or [""] * len(words)))[0]
    voices, seeds = of_speaker.max() + 1, len(difference)
    times = generator.multinomial(voices, np.full(voices, 1 / voices), size=RESAMPLES)  # (resamples, speakers)
    edits_drawn, words_drawn = np.zeros((RESAMPLES, seeds)), np.zeros(RESAMPLES)
    for voice in range(voices):
        own = of_speaker == voice
        count = int(own.sum())
        draws = generator.multinomial(count * times[:, voice], np.full(count, 1 / count))  # (resamples, utterances)
        edits_drawn += draws @ difference[:, own].T
        words_drawn += draws @ words[own]
    seeds_drawn = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=RESAMPLES) / seeds
    low, high = np.quantile((edits_drawn * seeds_drawn).sum(1) / words_drawn, (0.025, 0.975))
    return float(difference.mean(0).sum() / words.sum()), float(low), float(high)


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
