"""The methods that the accuracy table and curves compare, and the comparison, paired by seed and by utterance."""

import json
from dataclasses import dataclass, replace

import jiwer
import numpy as np
import pandas

from experiments.sweeps import Scale, Sweep, jobs
from sparsewav.pipeline import run_folder

RESAMPLES = 10_000
"""Bootstrap samples of the utterances."""

EXACT = ("allocation=hutchinson", "allocation.exact_budget=true", "allocation.alpha=0.08")
"""The paper's allocation, shifted to the very sparsity that the others reach. At 90 % there is no room for its own α of
0.1 besides the shift, whatever the ranking."""


@dataclass(frozen=True)
class Variant:
    """One method.

    Attributes:
        name: The name of its row, for a preset that of its file in ``conf/experiment``.
        settings: The settings that differ from the default configuration.
        preset: Whether it is a preset, whose settings stand in its file.
        ablation: Whether it shows what one part is worth, and is run at two sparsities alone.
        curve: Its label in the accuracy curves; None to leave it out there.
        seconds: Duration of a run at demo scale; None where it is that of the paper's method.
    """

    name: str
    settings: tuple[str, ...] = ()
    preset: bool = False
    ablation: bool = False
    curve: str | None = None
    seconds: float | None = None

    @property
    def one_shot(self) -> Sweep:
        return self._sweep("ours/accuracy_ablation" if self.ablation else "ours/accuracy_one_shot")

    @property
    def tuned(self) -> Sweep:
        return replace(self._sweep("ours/accuracy_tuned"), demo=("training=demo_short",), seconds=None)

    def _sweep(self, experiment: str) -> Sweep:
        preset = self.name if self.preset else None
        return Sweep(experiment, "base", both=self.settings, preset=preset, seconds=self.seconds)


ALPS = (*EXACT, "solver=alps")
TRUE_SEQUENTIAL = "calibration.propagation=true_sequential"
ASYMMETRIC = (TRUE_SEQUENTIAL, "objective=asymmetric")
RECONSTRUCTION = ("calibration.propagation=sequential", "recovery=reconstruction", "recovery.steps=50")

VARIANTS = (
    Variant("the paper's method, exact budget", EXACT, curve="the paper's method"),
    Variant("the paper's method as it is"),
    Variant("+ saliency compared within matrices", (*EXACT, "solver.comparison_group=matrix"), ablation=True),
    Variant("+ true_sequential, asymmetric", (*EXACT, *ASYMMETRIC), ablation=True, seconds=15.0),
    Variant(
        "+ true_sequential, asymmetric, saliency obs",
        (*EXACT, *ASYMMETRIC, "saliency=obs"),
        ablation=True,
        seconds=15.0,
    ),
    Variant("+ sequential, reconstruction", (*EXACT, *RECONSTRUCTION), ablation=True, seconds=45.0),
    Variant("+ obs_refit", (*EXACT, "solver=obs_refit"), ablation=True),
    Variant("+ alps", ALPS, seconds=25.0),
    Variant("+ alps, true_sequential, asymmetric", (*ALPS, *ASYMMETRIC), ablation=True, seconds=45.0),
    Variant("+ alps, true_sequential", (*ALPS, TRUE_SEQUENTIAL), ablation=True, seconds=30.0),
    Variant(
        "+ alps, true_sequential, affine", (*ALPS, TRUE_SEQUENTIAL, "recovery=affine"), ablation=True, seconds=35.0
    ),
    Variant("alps, uniform", ("solver=alps", "allocation=uniform"), ablation=True, seconds=20.0),
    Variant("alps, hawq", ("solver=alps", "allocation=hawq"), ablation=True, seconds=60.0),
    Variant("alps, error curves", ("solver=alps", "allocation=error_curves"), ablation=True, seconds=110.0),
    Variant(
        "alps, search", ("solver=alps", "allocation=search", "allocation.evaluations=150"), ablation=True, seconds=140.0
    ),
    Variant("best_oneshot", preset=True, curve="best_oneshot", seconds=50.0),
    Variant("best", preset=True, curve="best", seconds=230.0),
)
"""All are compared with the first one; those whose name begins with a + add to it."""


def read_edits(sweep: Sweep, scale: Scale) -> dict[tuple[float, int], pandas.DataFrame]:
    """Edits and words of every utterance, by the sparsity and the seed of each finished run."""
    edits = {}
    for job in jobs(sweep, scale):
        metrics = json.loads((job.folder / run_folder.METRICS).read_text())
        with (job.folder / run_folder.PREDICTIONS).open(encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        outputs = [jiwer.process_words(row["reference"], row["after"]) for row in rows]
        edits[metrics["target_sparsity"], metrics["seed"]] = pandas.DataFrame(
            {
                "edits": [out.substitutions + out.deletions + out.insertions for out in outputs],
                "words": [out.hits + out.substitutions + out.deletions for out in outputs],
            },
            index=[row["id"] for row in rows],
        )
    return edits


def bootstrap_difference(
    edits: np.ndarray, baseline: np.ndarray, words: np.ndarray, seed: int = 0
) -> tuple[float, float, float]:
    """Difference of two corpus word error rates with its 95 % interval over utterances.

    Args:
        edits: Number of edits in every utterance, or its mean over seeds, shape (utterances,).
        baseline: The same of the other method, shape (utterances,).
        words: Number of words in every reference, shape (utterances,).
        seed: Seed of the resampling.

    Returns:
        Difference (fraction), and its 2.5 % and 97.5 % quantiles over :data:`RESAMPLES` samples of the utterances with
        replacement. Every sample takes the same utterances of both methods.
    """
    count = len(words)
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    differences = (draws @ (edits - baseline)) / (draws @ words)  # (resamples,)
    low, high = np.quantile(differences, (0.025, 0.975))
    return float((edits - baseline).sum() / words.sum()), float(low), float(high)


def compare(
    variant: dict[tuple[float, int], pandas.DataFrame],
    baseline: dict[tuple[float, int], pandas.DataFrame],
    sparsity: float,
) -> tuple[float, float, float]:
    """Apply :func:`bootstrap_difference` to the edits at one sparsity, averaged over the seeds."""
    seeds = sorted(seed for target, seed in variant if target == sparsity)
    words = variant[sparsity, seeds[0]]["words"]

    def mean_edits(runs: dict[tuple[float, int], pandas.DataFrame]) -> np.ndarray:
        return np.mean([runs[sparsity, seed]["edits"].loc[words.index].to_numpy() for seed in seeds], axis=0)

    return bootstrap_difference(mean_edits(variant), mean_edits(baseline), words.to_numpy())


def layer_errors(sweep: Sweep, scale: Scale) -> dict[float, float]:
    """Mean relative error of the matrices on the calibration set, over the seeds, by sparsity."""
    errors: dict[float, list[float]] = {}
    for job in jobs(sweep, scale):
        metrics = json.loads((job.folder / run_folder.METRICS).read_text())
        layers = pandas.read_csv(job.folder / run_folder.LAYERS)
        errors.setdefault(metrics["target_sparsity"], []).append(float(layers["relative_error"].mean()))
    return {sparsity: float(np.mean(values)) for sparsity, values in errors.items()}
