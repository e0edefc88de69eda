"""The figure of a sweep: error rates against what varies."""

from pathlib import Path
from textwrap import fill
from typing import Any

import pandas

from sparsewav.cli.sweep_runs import TARGET, Sweep
from sparsewav.files import write_file
from sparsewav.settings.pruning import TRANSFORMER

GREY = "#444444"
"""The colour of the dense model."""

FULL_LEGEND = 12
"""Lines whose legend fits below the axes in a legible size."""


def draw(sweep: Sweep, path: Path) -> bool:
    """Draw the error rates of a sweep's finished runs, and tell whether there was anything to draw.

    Where the sparsity varies, it is on the horizontal axis as it was reached, and else another setting that is a
    number; there is a line for every combination of the others. Without such a setting every combination is a bar.
    Points and bars are means over the seeds, with their standard deviation where there are several. Dense models are
    dashed lines.
    """
    points = _points(sweep)
    if points.empty:
        return False
    import matplotlib as mpl  # late, as it takes half a second
    from matplotlib.figure import Figure

    from sparsewav.cli.plots import STYLE

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        axes = figure.add_subplot()
        if points["x"].notna().any():
            _draw_lines(points, figure, axes)
        else:
            _draw_bars(points, figure, axes)
        missing = f" ({len(sweep.failed)} of {len(sweep.runs)} runs failed)" if len(sweep.failed) else ""
        shared = " ".join(f"{key}={value}" for key, value in sweep.shared.items() if "/" not in str(value))
        figure.suptitle(fill(f"{shared}{missing}", 90), fontsize=8)
        with write_file(path) as temporary:
            figure.savefig(temporary, format="png", metadata={"Software": None})
    return True


def _points(sweep: Sweep) -> pandas.DataFrame:
    """Give a row for every point or bar, the mean over the seeds.

    Its columns are ``label`` (the line or bar), ``x`` (NaN of bars), ``y`` and ``dense`` (NaN where there is none) in
    percent, or a divergence, and ``deviation`` over the seeds (NaN of one seed). Its attributes name these quantities.
    """
    runs = sweep.runs
    rates = ["cer" if sweep.any("cer_delta") else "wer", "divergence"]
    rate = next((rate for rate in rates if rate in runs and runs[rate].notna().any()), None)
    if rate is None:
        return pandas.DataFrame()
    keys = [key for key in sweep.axes if key != "seed"] or sweep.axes
    by_sparsity = sweep.varies("target_sparsity") and TARGET in keys
    numbers = [key for key in keys if runs[key].dtype.kind in "if" and key != "seed"]
    across = TARGET if by_sparsity else max(numbers, key=lambda key: runs[key].nunique(), default=None)
    labels = pandas.DataFrame({key: sweep.labels(key) for key in keys if key != across}, index=runs.index)
    share = 1.0 if rate == "divergence" else 100.0
    dense = runs.get(f"{rate}_dense", pandas.Series(float("nan"), runs.index))
    x = 100 * runs["achieved_sparsity"] if by_sparsity else runs[across] if across else float("nan")
    table = pandas.DataFrame(
        {
            "label": [", ".join(row) for row in labels.itertuples(index=False)] if len(labels.columns) else "",
            "group": runs[across] if across else 0,
            "x": x,
            "y": share * runs[rate],
            "dense": share * dense,
        }
    ).dropna(subset=["y"])
    groups = table.groupby(["label", "group"], sort=False)
    points = groups[["x", "y", "dense"]].mean().assign(deviation=groups["y"].std()).reset_index()
    scope = " or ".join(runs["scope"].dropna().unique()) if "scope" in runs else TRANSFORMER
    names = {"divergence": "Divergence from the dense model", "wer": "WER (%)", "cer": "CER (%)"}
    points.attrs = {
        "x": f"Sparsity reached by the {scope}'s matrices (%)" if by_sparsity else across,
        "y": names[rate],
        "label": ", ".join(labels),
    }
    return points


def _draw_lines(points: pandas.DataFrame, figure: Any, axes: Any) -> None:
    from sparsewav.cli.plots import COLORS, MARKERS, logarithmic_wer

    lines = dict(list(points.groupby("label", sort=False)))
    dense = points["dense"].dropna().round(6).unique()
    for index, (label, line) in enumerate(lines.items()):
        color = COLORS[index % len(COLORS)]
        style = ("-", "--", ":", "-.")[index // len(COLORS) % 4]
        marker = MARKERS[index // len(COLORS) % len(MARKERS)] if len(lines) > len(COLORS) else MARKERS[index]
        line = line.sort_values("x")
        deviation = line["deviation"].fillna(0)
        axes.errorbar(
            *(line["x"], line["y"]),
            yerr=deviation if deviation.any() else None,
            color=color,
            marker=marker,
            linestyle=style,
            label=label,
            capsize=2,
            zorder=3,
        )
        own = line["dense"].dropna()
        if len(dense) > 1 and len(own):  # of several models each line has its own
            axes.axhline(own.iloc[0], color=color, linestyle="--", linewidth=0.8, zorder=2)
    if len(dense) == 1:
        axes.axhline(dense[0], color=GREY, linestyle="--", linewidth=1.0, label=f"dense ({dense[0]:.2f})", zorder=2)
    axes.set_xlabel(points.attrs["x"])
    axes.set_ylabel(points.attrs["y"] + (", dashed: dense" if len(dense) > 1 else ""))
    span = pandas.concat([points["y"], points["dense"]]).dropna()
    if span.min() > 0 and span.max() > 4 * span.min():
        if points.attrs["y"].endswith("(%)"):
            logarithmic_wer(axes)
        else:
            axes.set_yscale("log")
    if points["group"].min() > 0 and points["group"].max() > 15 * points["group"].min():
        axes.set_xscale("log")
    if not points.attrs["x"].startswith("Sparsity") and len(set(points["x"])) <= 10:
        axes.set_xticks(sorted(set(points["x"])), [f"{value:g}" for value in sorted(set(points["x"]))])
        axes.minorticks_off()
    _legend(figure, axes, 3.8, points.attrs["label"])


def _legend(figure: Any, axes: Any, height: float, title: str = "") -> None:
    """Put the legend below the axes, where it hides nothing, the dense model last; the axes keep their height."""
    pairs = [pair for pair in zip(*axes.get_legend_handles_labels(), strict=True) if pair[1]]
    if not pairs:
        return
    handles, labels = map(list, zip(*sorted(pairs, key=lambda pair: pair[1].startswith("dense (")), strict=True))
    columns = max(1, min(len(labels), 100 // (max(map(len, labels)) + 8)))
    figure.set_size_inches(6.4, height + 0.18 * (-(-len(labels) // columns) + bool(title)))
    size = 8 if len(labels) <= FULL_LEGEND else 6.5
    style: Any = {"ncols": columns, "fontsize": size, "title_fontsize": size}
    figure.legend(handles, labels, loc="outside lower center", title=title or None, **style)


def _draw_bars(points: pandas.DataFrame, figure: Any, axes: Any) -> None:
    from sparsewav.cli.plots import COLORS

    places = range(len(points))
    deviation = points["deviation"].fillna(0)
    axes.barh(places, points["y"], color=COLORS[0], height=0.7, xerr=deviation if deviation.any() else None, zorder=2)
    digits = ".2f" if points.attrs["y"].endswith("(%)") else ".3g"
    for place, value in zip(places, points["y"], strict=True):
        text = f"{value:{digits}}"
        axes.annotate(text, (value, place), (4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks(places, points["label"].tolist(), fontsize=8)
    axes.set_ylabel(points.attrs["label"], fontsize=8)
    axes.set_ylim(len(points) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    dense = points["dense"].dropna().round(6).unique()
    if len(dense) == 1:
        axes.axvline(dense[0], color=GREY, linestyle="--", linewidth=1.0, label=f"dense ({dense[0]:.2f})")
    else:
        for place, value in zip(places, points["dense"], strict=True):
            axes.plot([value, value], [place - 0.45, place + 0.45], color=GREY, linestyle="--", linewidth=1.0)
    axes.margins(x=0.12)
    axes.set_xlabel(points.attrs["y"] + (", dashed: dense" if len(dense) > 1 else ""))
    height = 1.3 + 0.26 * len(points)
    figure.set_size_inches(6.4, height)
    _legend(figure, axes, height)
