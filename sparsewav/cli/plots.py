"""The style of all plots."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
"""The palette of Okabe and Ito (2008), which is distinct to every kind of colour vision, and in grey."""
MARKERS = ("o", "s", "^", "D", "v")

STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "lines.linewidth": 1.5,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "pdf.fonttype": 42,
    "savefig.dpi": 200,
}

_TICKS = (1, 2, 3, 4, 5, 6, 8, 10, 15, 20, 30, 40, 60, 80, 100, 150)


def logarithmic_wer(axes: Axes) -> None:
    """Give a plot a logarithmic axis of WER in percent, with ticks that can be read off."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    ticks: list[float] = [tick for tick in _TICKS if low <= tick <= high]
    if len(ticks) < 3:  # a narrow range falls between them
        ticks = [tick for tick in MaxNLocator(5).tick_values(low, high) if low <= tick <= high]
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
