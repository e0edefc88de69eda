"""The plot of WER over sparsity, and how plots are written."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import pandas
from matplotlib.figure import Figure

from experiments.results import counted, seeds_of
from sparsewav.cli.plots import COLORS, MARKERS, STYLE, logarithmic_wer
from sparsewav.files import write_file


@dataclass(frozen=True)
class Curve:
    """One line of a plot.

    Attributes:
        label: Its name in the legend.
        points: A row a run, with the columns target_sparsity, achieved_sparsity and wer (fractions), seed and updates;
            runs of one target differ by their seed.
        dense: WER of the dense model as a fraction; None to leave its line out.
        color: Index of its colour and marker; None for the next one.
        dotted: Whether its line is dotted, to tell it from another curve of the same colour.
    """

    label: str
    points: pandas.DataFrame
    dense: float | None = None
    color: int | None = None
    dotted: bool = False


def plot_curves(path: Path, title: str, curves: Sequence[Curve]) -> None:
    """Draw WER over the sparsity that was reached to ``<path>.png`` and ``<path>.pdf``.

    A point is the mean of the runs with one target in both directions, as seeds may reach different sparsities. The
    band around a line spans one standard deviation over the seeds. The WER has a logarithmic axis: it runs from a few
    percent to nearly a hundred.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 3.6), layout="constrained")
        axes = figure.add_subplot()
        own_dense = len({curve.dense for curve in curves if curve.dense is not None}) > 1
        shown: list[float] = []
        for index, curve in enumerate(curves):
            style = index if curve.color is None else curve.color
            color, marker = COLORS[style], MARKERS[style]
            groups = 100 * curve.points.set_index("target_sparsity")[["achieved_sparsity", "wer"]]
            means = groups.groupby(level=0).mean()
            sparsity, mean = means["achieved_sparsity"], means["wer"]
            deviation = groups["wer"].groupby(level=0).std().fillna(0.0)
            shown += sparsity.tolist()
            if curve.dense is not None and (own_dense or index == 0):
                axes.axhline(
                    100 * curve.dense,
                    color=color if own_dense else "#444444",
                    linestyle="--",
                    linewidth=1.0,
                    label=f"dense ({100 * curve.dense:.1f} %)" if not own_dense else None,
                    zorder=2,
                )
            line = ":" if curve.dotted else "-"
            axes.plot(sparsity, mean, color=color, marker=marker, linestyle=line, label=legend(curve), zorder=3)
            if deviation.any():
                low = (mean - deviation).clip(lower=0.3 * mean)
                axes.fill_between(sparsity, low, mean + deviation, color=color, alpha=0.2, linewidth=0)
        axes.set_xlabel("Sparsity reached by the transformer's matrices (%)")
        axes.set_ylabel("WER (%)")
        logarithmic_wer(axes)
        axes.set_xticks(range(0, 101, 10))
        axes.set_xlim(min(shown) - 5, max(shown) + 5)
        axes.set_title(f"{title} (dashed: dense)" if own_dense else title, fontsize=10)
        handles, labels = axes.get_legend_handles_labels()
        columns = len(labels) if sum(map(len, labels)) < 60 else 1
        figure.set_size_inches(5.2, 3.3 + 0.2 * len(labels) / columns)
        figure.legend(
            handles, labels, loc="outside lower center", ncols=columns
        )  # below the axes, where it hides no curve
        save(figure, path)


def legend(curve: Curve) -> str:
    """The label of a curve with its seeds and updates."""
    updates = sorted(set(curve.points["updates"]))
    span = f"{updates[0]:,} to {updates[-1]:,} updates" if len(updates) > 1 else counted(updates[0], "update")
    return f"{curve.label} ({seeds_of(curve.points, ['target_sparsity'])}, {span})"


def save(figure: Figure, path: Path) -> None:
    """Write a plot to ``<path>.png`` and ``<path>.pdf``."""
    for suffix in ("png", "pdf"):
        # Without a date in the file, the same figures give the same bytes.
        metadata = {"CreationDate": None} if suffix == "pdf" else {"Software": None}
        with write_file(path.with_name(f"{path.name}.{suffix}")) as temporary:
            figure.savefig(temporary, format=suffix, metadata=metadata)
