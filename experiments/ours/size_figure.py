"""The figure of WER over bytes on disk."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from experiments.ours.speed import CUT, KIND_COLORS, KINDS, METHOD_MARKERS
from experiments.plots import save
from sparsewav.cli.plots import COLORS, STYLE, logarithmic_wer

DENSE = "dense"
NEAREST = "rounded to the nearest"
QUANTIZED = "quantised only"
PRUNED = "pruned only"
BOTH = "both"
BUDGET = "budget"
OTHERS = "Table 2"

CURVES: dict[str, dict[str, Any]] = {
    NEAREST: {"color": COLORS[3], "marker": "D", "linestyle": ":", "fillstyle": "none"},
    QUANTIZED: {"color": COLORS[3], "marker": "D", "linestyle": "-"},
    PRUNED: {"color": COLORS[4], "marker": "v", "linestyle": "-"},
    BOTH: {"color": "#56B4E9", "marker": "s", "linestyle": "-"},
    BUDGET: {"color": COLORS[0], "marker": "o", "linestyle": "-"},
}
"""By kind, in the order of the legend."""
TICKS = (0.5, 0.6, 0.8, 1, 1.2, 1.5, 2, 3, 4, 6, 8, 12, 16, 20, 25, 30, 40, 50, 60, 80, 100, 150, 200, 300, 400, 600)


def plot(path: Path, points: pandas.DataFrame) -> None:
    """Draw WER over megabytes, both logarithmic, to ``<path>.png`` and ``<path>.pdf``.

    Args:
        path: The files' path without suffix.
        points: A row a model, with the columns kind, label, method, bytes, wer_mean and wer_deviation (fractions). A
            curve goes through the best of its points, that is those that no other one beats in both.
    """
    points = points.assign(megabytes=points["bytes"] / 1e6, wer=100 * points["wer_mean"])
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.6, 5.6), layout="constrained")
        axes = figure.add_subplot()
        others = _others(axes, points)
        dense = points[points["kind"] == DENSE]
        axes.axhline(dense["wer"].iloc[0], color="#444444", linestyle="--", linewidth=1.0, zorder=1)
        axes.plot(dense["megabytes"], dense["wer"], "*", color="#444444", markersize=8, linestyle="none", zorder=4)
        for row in dense.to_dict("records"):
            place = (row["megabytes"], row["wer"])
            axes.annotate(row["label"], place, xytext=(0, 6), textcoords="offset points", fontsize=7.5, ha="center")
        ours = [Line2D([], [], color="#444444", marker="*", markersize=8, linestyle="--", label="dense")]
        for kind, style in CURVES.items():
            own = points[points["kind"] == kind].sort_values("megabytes")
            best = own[own["wer"] <= own["wer"].cummin()]
            axes.plot(best["megabytes"], best["wer"], **style, zorder=3)
            rest = own.drop(best.index)
            axes.plot(rest["megabytes"], rest["wer"], **style | {"linestyle": "none"}, zorder=3)
            axes.errorbar(
                own["megabytes"],
                own["wer"],
                100 * own["wer_deviation"],
                fmt="none",
                color=style["color"],
                elinewidth=0.8,
                zorder=2,
            )
            ours.append(Line2D([], [], label=kind, **style))
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        axes.xaxis.set_major_locator(FixedLocator([tick for tick in TICKS if low <= tick <= high]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        logarithmic_wer(axes)
        axes.set_xlabel("Weights on disk (MB)")
        axes.set_ylabel("WER (%)")
        figure.legend(handles=[*ours, *others], loc="outside lower center", ncols=3, fontsize=7.5)
        save(figure, path)


def _others(axes: Axes, points: pandas.DataFrame) -> list[Line2D]:
    """Draw the models of Table 2, float16 hollow and int8 filled, with a line from one to the other."""
    own = points[~points["kind"].isin([*CURVES, DENSE])]
    handles: list[Line2D] = []
    markers = iter(METHOD_MARKERS)
    sparse = KIND_COLORS["SparseWAV"]
    for model, rows in own.groupby("label", sort=False):
        kind = KINDS.get(rows["method"].iloc[0], CUT)
        color, marker = (sparse, "h") if kind == "SparseWAV" else (KIND_COLORS[kind], next(markers))
        axes.plot(rows["megabytes"], rows["wer"], color=color, linewidth=0.6, alpha=0.6, zorder=1)
        for row in rows.to_dict("records"):
            style = "none" if row["kind"].endswith("float16") else "full"
            axes.plot(row["megabytes"], row["wer"], marker, color=color, fillstyle=style, markersize=4, alpha=0.8)
        label = "SparseWAV, fine-tuned" if kind == "SparseWAV" else str(model)
        if label not in [handle.get_label() for handle in handles]:
            handles.append(Line2D([], [], color=color, marker=marker, markersize=4, linestyle="none", label=label))
    hollow = Line2D([], [], color="#777777", marker="o", fillstyle="none", linestyle="none", label=f"{OTHERS}: float16")
    filled = Line2D([], [], color="#777777", marker="o", linestyle="none", label=f"{OTHERS}: int8")
    return [*handles, hollow, filled]
