"""The methods that the accuracy table and curves compare."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas

from experiments.sweeps import Sweep
from sparsewav.errors import UserError
from sparsewav.pipeline import run_folder

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
    Variant(
        "alps, uniform, weighted outputs",
        ("solver=alps", "allocation=uniform", "solver.output_weighting=fisher"),
        ablation=True,
        seconds=25.0,
    ),
    Variant("alps, hawq", ("solver=alps", "allocation=hawq"), ablation=True, seconds=60.0),
    Variant("alps, error curves", ("solver=alps", "allocation=error_curves"), ablation=True, seconds=110.0),
    Variant(
        "alps, search", ("solver=alps", "allocation=search", "allocation.evaluations=150"), ablation=True, seconds=140.0
    ),
    Variant("best_oneshot", preset=True, curve="best_oneshot", seconds=60.0),
    Variant("best", preset=True, curve="best", seconds=500.0),
)
"""All are compared with the first one; those whose name begins with a + add to it."""


def recovery_updates(stages: list[dict[str, Any]]) -> int:
    """Updates in which the whole model learned the dense model's outputs, from the stages of a run's metrics."""
    return (stages[-1].get("recovery") or {}).get("updates", 0)


def layer_error(runs: pandas.DataFrame) -> float:
    """Mean relative error of the matrices on the calibration set, over runs that differ in their seeds alone.

    Raises:
        UserError: A run has no such file, or it is damaged.
    """
    errors = []
    for run in runs["run"]:
        path = Path(run) / run_folder.LAYERS
        try:
            errors.append(float(pandas.read_csv(path)["relative_error"].mean()))
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{path} is missing or damaged ({error}); run it again with force=true") from None
    return sum(errors) / len(errors)
