"""``python -m experiments.ours.front_figure``: the figure of the front page, WER over sparsity without fine-tuning.

It reads the one-shot runs of the accuracy curves and writes ``experiments/figures/wer_over_sparsity.png`` and ``.csv``:

    ./reproduce.sh accuracy_curves
    python -m experiments.ours.front_figure

The folder and the settings of the runs are those that ``./reproduce.sh`` was given:

    ./reproduce.sh accuracy_curves --output outputs/train -- data.calibration_subset=train
    python -m experiments.ours.front_figure --runs outputs/train -- data.calibration_subset=train
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import pandas
from hydra.errors import HydraException
from matplotlib.figure import Figure
from omegaconf.errors import OmegaConfBaseException

from experiments.ours.variants import VARIANTS, Variant
from experiments.results import counted, summarize
from experiments.sweeps import DATA_KEYS, MODEL_KEYS, Scale, check_comparable, read
from sparsewav.cli.explain import explain
from sparsewav.cli.plots import COLORS, MARKERS, STYLE
from sparsewav.errors import UserError
from sparsewav.files import write_file

PAPER, BEST_ONESHOT, BEST = (variant for variant in VARIANTS if variant.curve)
LABELS = {PAPER: "the paper's method", BEST_ONESHOT: "best_oneshot, no labels", BEST: "best, no labels"}
OUTPUT = Path(__file__).parents[1] / "figures"


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.ours.front_figure",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--runs", type=Path, default=Path("outputs/demo"), help="of the runs (default outputs/demo)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="of the figure (default experiments/figures)")
    parser.add_argument("settings", nargs="*", metavar="-- KEY=VALUE", help="those that every run was given")
    arguments = parser.parse_args(words)
    try:
        scale = Scale("demo", arguments.runs, tuple(arguments.settings))
        curves = {variant: read([variant.one_shot], scale) for variant in LABELS}
        check_comparable(pandas.concat(curves.values(), ignore_index=True), MODEL_KEYS | DATA_KEYS)
        points = {variant: mean_over_seeds(runs, arguments.output) for variant, runs in curves.items()}
    except UserError as error:
        parser.exit(1, f"error: {error}\n")
    except (HydraException, OmegaConfBaseException) as error:  # of the settings behind --
        parser.exit(1, f"error: {explain(error, 'config')}\n")
    png, csv = (arguments.output / f"wer_over_sparsity.{suffix}" for suffix in ("png", "csv"))
    with write_file(csv) as path:
        table = pandas.concat([points[variant].assign(method=label) for variant, label in LABELS.items()])
        # It is committed: where its runs lay says nothing elsewhere.
        table[["method", *table.columns.drop(["method", "runs"])]].to_csv(path, index=False, float_format="%.6g")
    first = curves[PAPER].iloc[0]
    title = f"{first['model']}, pruned without fine-tuning (dense: {100 * first['wer_dense']:.2f} %)"
    plot(png, points, title, first["wer_dense"])
    print(f"{png}  {csv}")
    return 0


def mean_over_seeds(runs: pandas.DataFrame, folder: Path) -> pandas.DataFrame:
    """A row a target sparsity, as :func:`~experiments.results.summarize` makes it for a CSV in a folder."""
    return pandas.DataFrame([summarize(chosen, folder) for _, chosen in runs.groupby("target_sparsity")])


def plot(path: Path, points: dict[Variant, pandas.DataFrame], title: str, dense: float) -> None:
    """Draw the mean WER over the mean sparsity reached, with a band of one standard deviation over the seeds."""
    with mpl.rc_context(STYLE | {"font.size": 12, "lines.linewidth": 2.2, "lines.markersize": 6}):
        figure = Figure(figsize=(7.0, 4.2), dpi=100, layout="constrained")
        axes = figure.add_subplot()
        axes.axhline(100 * dense, color="#444444", linestyle="--", linewidth=1.4, label="dense")
        # The paper's method first in the legend, and in the colour that it has in the other figures.
        for (variant, curve), color, marker in zip(points.items(), COLORS, MARKERS, strict=False):
            sparsity, wer = 100 * curve["achieved_sparsity"], 100 * curve["wer_mean"]
            deviation = 100 * curve["wer_deviation"]
            seeds = counted(curve["seeds"].iloc[0], "seed")
            axes.plot(sparsity, wer, color=color, marker=marker, label=f"{LABELS[variant]} ({seeds})")
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
