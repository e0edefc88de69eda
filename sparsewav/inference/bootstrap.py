"""Confidence intervals of error rates and of their differences, by the bootstrap over speakers and utterances."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas
from jaxtyping import Float, Shaped

RESAMPLES = 10_000
"""Bootstrap samples."""


AT_ONCE = 2**22
"""Draws that are held in memory at once."""


class Interval(NamedTuple):
    """A figure (a fraction) and its 95 % interval."""

    value: float
    low: float
    high: float


def bootstrap_rate(
    edits: Shaped[np.ndarray, " utterances"],
    lengths: Shaped[np.ndarray, " utterances"],
    speakers: Sequence[str] | None,
    seed: int = 0,
) -> Interval:
    """Give an error rate of a corpus with its interval; see :func:`bootstrap_difference`."""
    return bootstrap_difference(edits[None], np.zeros_like(edits)[None], lengths, speakers, seed)


def bootstrap_difference(
    edits: Shaped[np.ndarray, "seeds utterances"],
    baseline: Shaped[np.ndarray, "seeds utterances"],
    lengths: Shaped[np.ndarray, " utterances"],
    speakers: Sequence[str] | None,
    seed: int = 0,
) -> Interval:
    """Give the difference of two corpus error rates with its 95 % interval over seeds, speakers and utterances.

    Every bootstrap sample draws the seeds with replacement and, independently of them, the speakers, and of every
    speaker drawn as many utterances as it has. Both methods get the same sample: the errors that they share cancel out.

    Args:
        edits: Number of edits with every seed in every utterance.
        baseline: The same of the other method, with the same seeds.
        lengths: Number of words, or of characters, in every reference.
        speakers: The speaker of every utterance; None to draw the utterances without regard to them.
        seed: Seed of the resampling.

    Returns:
        The difference, and its 2.5 % and 97.5 % quantiles over :data:`RESAMPLES` samples.
    """
    generator = np.random.default_rng(seed)
    difference = edits - baseline
    edits_drawn, lengths_drawn = _sums(difference, lengths, speakers, generator)
    seeds = len(difference)
    seeds_drawn = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=RESAMPLES) / seeds
    low, high = np.quantile((edits_drawn * seeds_drawn).sum(1) / lengths_drawn, (0.025, 0.975))
    return Interval(float(difference.mean(0).sum() / lengths.sum()), float(low), float(high))


def _sums(
    difference: Shaped[np.ndarray, "seeds utterances"],
    lengths: Shaped[np.ndarray, " utterances"],
    speakers: Sequence[str] | None,
    generator: np.random.Generator,
) -> tuple[Float[np.ndarray, "resamples seeds"], Float[np.ndarray, " resamples"]]:
    """Sum edits and lengths over the utterances of every bootstrap sample."""
    of_speaker = pandas.factorize(np.array(speakers or [""] * len(lengths)))[0]
    voices = of_speaker.max() + 1
    times = generator.multinomial(voices, np.full(voices, 1 / voices), size=RESAMPLES)  # (resamples, speakers)
    edits_drawn, lengths_drawn = np.zeros((RESAMPLES, len(difference))), np.zeros(RESAMPLES)
    for voice in range(voices):
        own = of_speaker == voice
        count = int(own.sum())
        block = max(1, AT_ONCE // count)
        for some in (slice(first, first + block) for first in range(0, RESAMPLES, block)):
            draws = generator.multinomial(count * times[some, voice], np.full(count, 1 / count))  # (block, utterances)
            edits_drawn[some] += draws @ difference[:, own].T
            lengths_drawn[some] += draws @ lengths[own]
    return edits_drawn, lengths_drawn
