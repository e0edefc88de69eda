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
import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import pandas
from matplotlib.figure import Figure

from experiments.ours.variants import VARIANTS, Variant
from experiments.plots import COLORS, MARKERS, STYLE
from experiments.sweeps import Scale, jobs, read
from sparsewav.errors import UserError
from sparsewav.files import write_file
from sparsewav.pipeline import run_folder

PAPER, BEST_ONESHOT, BEST = (variant for variant in VARIANTS if variant.curve)
LABELS = {PAPER: "the paper's method", BEST_ONESHOT: "best_oneshot, no labels", BEST: "best, no labels"}
OUTPUT = Path(__file__).parents[1] / "figures"
SCALE = Scale("demo", Path("outputs/demo"))
METHOD = ("saliency", "solver", "allocation", "recovery")
"""Keys of ``metrics.json`` that tell the methods apart."""


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
        dense = dense_of(pandas.concat(curves.values()))
    except UserError as error:
        parser.exit(1, f"error: {error}\n")
    points = {variant: mean_over_seeds(runs) for variant, runs in curves.items()}
    png, csv = (arguments.output / f"wer_over_sparsity.{suffix}" for suffix in ("png", "csv"))
    with write_file(csv) as path:
        table = pandas.concat([points[variant].assign(method=label) for variant, label in LABELS.items()])
        columns = ["method", "target_sparsity", "achieved_sparsity", "seeds", "wer", "wer_deviation"]
        table[columns].assign(wer_dense=dense).to_csv(path, index=False, float_format="%.6g")
    plot(png, points, dense)
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
    found = [json.loads(path.read_text()) for path in sorted(folder.glob(f"*/{run_folder.METRICS}"))]
    # ALPS uses no saliency.
    runs = pandas.DataFrame([run for run in found if all(run[key] in (value, None) for key, value in wanted.items())])
    described = ", ".join(f"{key}={value}" for key, value in wanted.items())
    if runs.empty:
        raise UserError(f"{folder} has no finished run of {described}")
    if runs.duplicated(["target_sparsity", "seed"]).any():
        raise UserError(f"{folder} has several runs of {described} with the same sparsity and seed; give each a folder")
    return runs


def dense_of(runs: pandas.DataFrame) -> float:
    """WER of the dense model of all runs.

    Raises:
        UserError: The runs started from different models, or were evaluated on different utterances.
    """
    dense = runs["wer_dense"].unique()
    if len(dense) > 1:
        raise UserError(f"the runs have different dense word error rates: {', '.join(f'{wer:.4f}' for wer in dense)}")
    return float(dense[0])


def mean_over_seeds(runs: pandas.DataFrame) -> pandas.DataFrame:
    """A row a target sparsity: means of the sparsity reached and of the WER, the WER's deviation, number of seeds."""
    groups = runs.groupby("target_sparsity")
    return pandas.DataFrame(
        {
            "achieved_sparsity": groups["achieved_sparsity"].mean(),
            "seeds": groups["seed"].nunique(),
            "wer": groups["wer"].mean(),
            "wer_deviation": groups["wer"].std(),
        }
    ).reset_index()


def plot(path: Path, points: dict[Variant, pandas.DataFrame], dense: float) -> None:
    """Draw the mean WER over the mean sparsity reached, with a band of one standard deviation over the seeds."""
    with mpl.rc_context(STYLE | {"font.size": 12, "lines.linewidth": 2.2, "lines.markersize": 6}):
        figure = Figure(figsize=(7.0, 4.2), dpi=100, layout="constrained")
        axes = figure.add_subplot()
        axes.axhline(100 * dense, color="#444444", linestyle="--", linewidth=1.4, label="dense")
        # The paper's method first in the legend, and in the colour that it has in the other figures.
        for (variant, curve), color, marker in zip(points.items(), COLORS, MARKERS, strict=False):
            sparsity, wer = 100 * curve["achieved_sparsity"], 100 * curve["wer"]
            deviation = 100 * curve["wer_deviation"].fillna(0.0)
            axes.plot(sparsity, wer, color=color, marker=marker, label=LABELS[variant])
            axes.fill_between(sparsity, wer - deviation, wer + deviation, color=color, alpha=0.2, linewidth=0)
        axes.set_xlim(40, 95)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("Sparsity of the transformer (%)")
        axes.set_ylabel("Word error rate (%)")
        axes.set_title(f"Demo model, pruned without fine-tuning (dense: {100 * dense:.2f} %)", fontsize=13)
        axes.legend(loc="upper left")
        with write_file(path) as temporary:
            # Without the drawing library's version, so that the same runs give the same bytes.
            figure.savefig(temporary, format="png", dpi=100, metadata={"Software": None}, pil_kwargs={"optimize": True})


if __name__ == "__main__":
    raise SystemExit(main())
