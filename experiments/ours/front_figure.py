"""``python -m experiments.ours.front_figure``: the figure of the front page, WER over sparsity without fine-tuning.

It reads finished runs of the demo model and writes ``experiments/figures/wer_over_sparsity.png`` and ``.csv``. By
default these are the one-shot runs of the accuracy curves:

    ./reproduce.sh accuracy_curves
    python -m experiments.ours.front_figure

Runs from elsewhere are named by the folder that holds them:

    points="sparsity.target=0.5,0.7,0.8,0.9 seed=0,1,2"
    sparsewav -m $points hydra.sweep.dir=outputs/front/paper
    sparsewav -m $points experiment=best_oneshot hydra.sweep.dir=outputs/front/best_oneshot
    sparsewav -m $points experiment=best hydra.sweep.dir=outputs/front/best
    python -m experiments.ours.front_figure --paper outputs/front/paper \\
        --best-oneshot outputs/front/best_oneshot --best outputs/front/best
"""

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from experiments.ours.variants import VARIANTS, Variant
from experiments.results import counted, summarize
from experiments.sweeps import DATA_KEYS, MODEL_KEYS, Scale, check_comparable, jobs, read, read_run
from sparsewav.cli.plots import COLORS, MARKERS, STYLE
from sparsewav.errors import UserError
from sparsewav.files import write_file
from sparsewav.pipeline import run_folder
from sparsewav.settings.run import Config

PAPER, BEST_ONESHOT, BEST = (variant for variant in VARIANTS if variant.curve)
LABELS = {PAPER: "the paper's method", BEST_ONESHOT: "best_oneshot, no labels", BEST: "best, no labels"}
OUTPUT = Path(__file__).parents[1] / "figures"
SCALE = Scale("demo", Path("outputs/demo"))
METHOD = ("method", "saliency", "solver", "objective", "allocation", "recovery", "quantization", "finetune_strategy")
"""Keys of ``metrics.json`` that tell the methods apart."""
RECORD = ".hydra/config.yaml"
"""The settings of a run, in its folder."""


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.ours.front_figure",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for variant in LABELS:
        option = "--paper" if variant is PAPER else f"--{variant.name.replace('_', '-')}"
        parser.add_argument(option, type=Path, metavar="FOLDER", dest=variant.name, help="its subfolders are the runs")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder (default experiments/figures)")
    arguments = parser.parse_args(words)
    try:
        curves = {variant: read_runs(variant, getattr(arguments, variant.name)) for variant in LABELS}
        check_comparable(pandas.concat(curves.values(), ignore_index=True), MODEL_KEYS | DATA_KEYS)
        points = {variant: mean_over_seeds(runs, arguments.output) for variant, runs in curves.items()}
    except UserError as error:
        parser.exit(1, f"error: {error}\n")
    png, csv = (arguments.output / f"wer_over_sparsity.{suffix}" for suffix in ("png", "csv"))
    with write_file(csv) as path:
        table = pandas.concat([points[variant].assign(method=label) for variant, label in LABELS.items()])
        table[["method", *table.columns.drop("method")]].to_csv(path, index=False, float_format="%.6g")
    first = curves[PAPER].iloc[0]
    title = f"{first['model']}, pruned without fine-tuning (dense: {100 * first['wer_dense']:.2f} %)"
    plot(png, points, title, first["wer_dense"])
    print(f"{png}  {csv}")
    return 0


def read_runs(variant: Variant, folder: Path | None) -> pandas.DataFrame:
    """Read the runs of one method.

    Args:
        variant: The method.
        folder: The folder of the runs, which may hold other methods, too; None for the runs of ``./reproduce.sh``.

    Returns:
        Their metrics, a row a run.

    Raises:
        UserError: A run is missing, or it is not clear which runs are meant.
    """
    if folder is None:
        return read([variant.one_shot], SCALE)
    config = jobs(variant.one_shot, SCALE)[0].config
    wanted = {group: config[group].name for group in METHOD}
    found = [read_run(path.parent) for path in sorted(folder.glob(f"*/{run_folder.METRICS}"))]
    # ALPS uses no saliency.
    runs = pandas.DataFrame([run for run in found if all(run[key] in (value, None) for key, value in wanted.items())])
    described = ", ".join(f"{key}={value}" for key, value in wanted.items())
    if runs.empty:
        raise UserError(f"{folder} has no finished run of {described}")
    if runs.duplicated(["target_sparsity", "seed"]).any():
        raise UserError(f"{folder} has several runs of {described} with the same sparsity and seed; give each a folder")
    first, *others = runs["run"]
    for other in others:
        if own_settings(Path(other)) != own_settings(Path(first)):
            raise UserError(
                f"{first} and {other} are runs of {described}, and differ in other settings than sparsity and seed "
                f"({RECORD}); give those of each setting a folder"
            )
    return runs


def own_settings(run: Path) -> dict[str, Any]:
    """All settings that a run's results depend on, but for its sparsity and its seed.

    Raises:
        UserError: The run has no record of its settings.
    """
    try:
        settings = dict(DictConfig(OmegaConf.load(run / RECORD)))
    except (OSError, ValueError, YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{run / RECORD} is missing or damaged ({error}); run it again with force=true") from None
    identifying = {item.name for item in fields(Config) if item.metadata["identifies"]}
    identifying -= {"sparsity", "seed", "training"}  # nothing is tuned
    return {key: value for key, value in settings.items() if key in identifying}


def mean_over_seeds(runs: pandas.DataFrame, folder: Path) -> pandas.DataFrame:
    """A row a target sparsity, as :func:`~experiments.results.summarize` makes it for a CSV in a folder."""
    return pandas.DataFrame([summarize(chosen, folder) for _, chosen in runs.groupby("target_sparsity")])


def _seeds(curve: pandas.DataFrame) -> str:
    low, high = curve["seeds"].min(), curve["seeds"].max()
    return counted(low, "seed") if low == high else f"{low} to {high} seeds"


def plot(path: Path, points: dict[Variant, pandas.DataFrame], title: str, dense: float) -> None:
    """Draw the mean WER over the mean sparsity reached, with a band of one standard deviation over the seeds."""
    with mpl.rc_context(STYLE | {"font.size": 12, "lines.linewidth": 2.2, "lines.markersize": 6}):
        figure = Figure(figsize=(7.0, 4.2), dpi=100, layout="constrained")
        axes = figure.add_subplot()
        axes.axhline(100 * dense, color="#444444", linestyle="--", linewidth=1.4, label="dense")
        # The paper's method first in the legend, and in the colour that it has in the other figures.
        for (variant, curve), color, marker in zip(points.items(), COLORS, MARKERS, strict=False):
            sparsity, wer = 100 * curve["achieved_sparsity"], 100 * curve["wer_mean"]
            deviation = 100 * curve["wer_deviation"].fillna(0.0)
            axes.plot(sparsity, wer, color=color, marker=marker, label=f"{LABELS[variant]} ({_seeds(curve)})")
            axes.fill_between(sparsity, wer - deviation, wer + deviation, color=color, alpha=0.2, linewidth=0)
        reached = pandas.concat([100 * curve["achieved_sparsity"] for curve in points.values()])
        axes.set_xlim(reached.min() - 8, reached.max() + 5)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("Sparsity reached by the transformer's matrices (%)")
        axes.set_ylabel("Word error rate (%)")
        axes.set_title(title, fontsize=13)
        axes.legend(loc="upper left")
        with write_file(path) as temporary:
            # Without the drawing library's version, so that the same runs give the same bytes.
            figure.savefig(temporary, format="png", dpi=100, metadata={"Software": None}, pil_kwargs={"optimize": True})


if __name__ == "__main__":
    raise SystemExit(main())
