"""Intervals of error rates against drawing one by one."""

import numpy as np
import pytest

from sparsewav.inference import bootstrap
from sparsewav.inference.bootstrap import bootstrap_difference, bootstrap_rate


def test_bootstrap_draws_seeds_speakers_and_utterances_in_pairs() -> None:
    """Its interval is that of drawing them one by one in a loop; errors that both methods make cancel out."""
    generator = np.random.default_rng(1)
    speakers = [f"voice{number}" for number in generator.permutation(np.repeat(np.arange(6), [4, 8, 12, 6, 20, 10]))]
    words = generator.integers(3, 20, 60)
    baseline = generator.binomial(words, 0.3, (3, 60)).astype(float)
    of_speaker = {name: np.flatnonzero(np.array(speakers) == name) for name in sorted(set(speakers))}
    worse = np.zeros(60)
    for number, own in enumerate(of_speaker.values()):
        worse[own] = number - 2  # speakers differ, and seeds do
    edits = baseline + worse + generator.integers(-1, 2, (3, 60)) + np.array([[0], [1], [2]])
    difference, low, high = bootstrap_difference(edits, baseline, words, speakers)
    assert difference == pytest.approx((edits - baseline).sum() / (3 * words.sum()))
    drawn = []
    for _ in range(4000):
        seeds = generator.integers(3, size=3)
        names = generator.choice(list(of_speaker), size=6)
        chosen = np.concatenate([generator.choice(of_speaker[name], size=len(of_speaker[name])) for name in names])
        parts = [method[np.ix_(seeds, chosen)].sum() / (3 * words[chosen].sum()) for method in (edits, baseline)]
        drawn.append(parts[0] - parts[1])
    assert (low, high) == pytest.approx(np.quantile(drawn, (0.025, 0.975)), abs=0.006)
    assert high - low > 0.1, "with utterances drawn alone it is narrower than this"
    _, narrow_low, narrow_high = bootstrap_difference(edits.mean(0)[None], baseline.mean(0)[None], words, None)
    assert narrow_high - narrow_low < 0.6 * (high - low)
    assert bootstrap_difference(baseline, baseline, words, speakers) == (0, 0, 0)
    assert bootstrap_difference(edits, baseline, words, speakers) == (difference, low, high)


def test_the_interval_of_a_rate_is_that_of_drawing_utterances(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(2)
    words = generator.integers(3, 20, 80)
    edits = generator.binomial(words, 0.2)
    rate = bootstrap_rate(edits, words, None)
    assert rate.value == edits.sum() / words.sum()
    chosen = generator.integers(80, size=(5000, 80))
    drawn = edits[chosen].sum(1) / words[chosen].sum(1)
    assert rate[1:] == pytest.approx(np.quantile(drawn, (0.025, 0.975)), abs=0.004)
    monkeypatch.setattr(bootstrap, "AT_ONCE", 1000)  # of a large corpus, a few samples at a time
    assert bootstrap_rate(edits, words, None) == pytest.approx(rate)
