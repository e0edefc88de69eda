"""Budgets: the best model that fits into so many megabytes, of every way to make it small."""

from typing import Any

import pandas

from experiments.differences import compare, describe_interval, read_edits
from experiments.ours.size import POINTS, SIZES, Point, read_point, values_of
from experiments.ours.size_figure import BOTH, BUDGET, PRUNED, QUANTIZED
from experiments.results import Item, Result, describe, reached, signed
from experiments.sweeps import DATA_KEYS, MODEL_KEYS, Scale, check_comparable
from experiments.tables import mean_and_deviation, write_table

KINDS = (QUANTIZED, PRUNED, BOTH, BUDGET)
COMPARED = tuple(
    point for point in POINTS if point.kind == QUANTIZED or (point.kind in KINDS and point.size is not None)
)
SWEEPS = tuple(point.sweep for point in COMPARED)
SHOWN_IN_PAPER = ("At most", *KINDS, "Budget − best other")


def make(item: Item, scale: Scale) -> Result:
    """Write the table; its CSV has a row for every size and kind, with the budget's difference to it and the interval.

    Raises:
        UserError: A run is missing.
    """
    runs = {point: read_point(point, scale) for point in COMPARED}
    everything = pandas.concat(runs.values(), ignore_index=True)
    check_comparable(everything, MODEL_KEYS | DATA_KEYS)
    dense = everything["wer_dense"].iloc[0]
    rows: list[dict[str, object]] = []
    values: list[dict[str, Any]] = []
    for size, megabytes in enumerate(SIZES[scale.name]):
        row: dict[str, object] = {"At most": f"{megabytes:g} MB"}
        found: dict[str, tuple[pandas.DataFrame, dict[str, Any]]] = {}
        for kind in KINDS:
            point = _fitting(kind, size, megabytes, runs)
            row[kind] = None
            if point is not None:
                value = {"at_most_megabytes": megabytes} | values_of(point, runs[point], scale)
                found[kind] = runs[point], value
                row[kind] = _cell(point, runs[point], value, megabytes)
        budget, own = found[BUDGET]
        edits = read_edits(budget)
        for chosen, value in found.values():
            if chosen is not budget:
                value |= dict(zip(("difference", "low", "high"), compare(edits, read_edits(chosen)), strict=True))
            value["above_dense"] = value["wer_mean"] - dense
        others = [value for chosen, value in found.values() if chosen is not budget]
        best = min(others, key=lambda value: value["wer_mean"])
        low, high = signed(100 * best["low"]), signed(100 * best["high"])
        row["Budget − best other"] = f"{signed(100 * best['difference'])}; {low} to {high} ({best['kind']})"
        row["Budget − dense"] = signed(100 * own["above_dense"])
        rows.append(row)
        values += [value for _, value in found.values()]
    frame, numbers = pandas.DataFrame(rows), pandas.DataFrame(values)
    over = numbers["bytes_most"] > 1e6 * numbers["at_most_megabytes"]
    notes = [
        *describe(everything, scale),
        f"Dense WER {100 * dense:.2f} %. WER: mean ± standard deviation over the seeds; in brackets the bytes of the "
        "whole weights file in bitmask format in MB (10^6 bytes, mean over the seeds), nominal bits of a weight of the "
        "transformer's matrices, and the sparsity reached by these.",
        *(["† A file of it is larger than that."] if over.any() else []),
        f"{QUANTIZED.capitalize()}: of the bits and group sizes of the item size whose files fit, those with the "
        f"lowest WER on this very set, which favours it. {PRUNED.capitalize()} (numbers in float16) and {BOTH}: "
        f"experiment=best_oneshot at the lowest uniform sparsity that fits. {BUDGET.capitalize()}: "
        "experiment=smallest. What is not prunable has 6 bits in all of them. None is fine-tuned.",
        f"Differences in points. {describe_interval(edits)}",
    ]
    seconds = numbers.groupby("kind", sort=False)["seconds"].mean()
    beside = [
        "Seconds of pruning, rounding and recovery, mean: "
        + "; ".join(f"{kind} {spent:.0f}" for kind, spent in seconds.items())
        + "."
    ]
    return write_table(item, scale, frame, notes, numbers, SHOWN_IN_PAPER, beside)


def _fitting(kind: str, size: int, megabytes: float, runs: dict[Point, pandas.DataFrame]) -> Point | None:
    """The point of this size; without one, the best of those of which all files fit; None if none does."""
    own = {point: chosen for point, chosen in runs.items() if point.kind == kind}
    for point in own:
        if point.size == size:
            return point
    fitting = [
        point for point, chosen in own.items() if point.size is None and chosen["bytes"].max() <= 1e6 * megabytes
    ]
    return min(fitting, key=lambda point: own[point]["wer"].mean(), default=None)


def _cell(point: Point, runs: pandas.DataFrame, value: dict[str, Any], megabytes: float) -> str:
    bits = "float16" if point.kind == PRUNED else point.label or f"{value['bits']:.2f} bits"
    over = " †" if value["bytes_most"] > 1e6 * megabytes else ""
    size = f"{value['bytes'] / 1e6:.2f} MB{over}"
    return f"{mean_and_deviation(100 * runs['wer'])} ({size}, {bits}, {reached(value['achieved_sparsity'])})"
