"""Size: WER over bytes on disk, of models that are pruned, quantised, both, or made by other methods."""

from dataclasses import dataclass
from typing import Any

import pandas

from experiments.estimate import typed
from experiments.ours import speed
from experiments.ours.size_figure import BOTH, BUDGET, DENSE, NEAREST, OTHERS, PRUNED, QUANTIZED, plot
from experiments.paper import baselines
from experiments.results import Item, Result, describe, measured_before, reached, summarize, write_measured
from experiments.sweeps import DATA_KEYS, MODEL_KEYS, Job, Scale, Sweep, check_comparable, jobs, read
from experiments.tables import write_table
from sparsewav.errors import UserError

SIZES = {"demo": (1.5, 1.2, 1.0, 0.8), "paper": (48.0, 38.0, 32.0, 25.0)}
"""Megabytes (10^6 bytes) that a whole weights file may have: 8, 10, 12 and 15 times fewer than in float32."""
BOTH_WIDTHS = ("int4", "int3", "int3", "int3")
"""The bits of every size that were best with a uniform sparsity on the development set (experiments/README.md)."""


@dataclass(frozen=True)
class Point:
    """One way to make a model small; its runs differ in their seeds alone.

    Attributes:
        kind: Which curve it is on.
        label: What tells it from the other points of the curve.
        sweep: Its runs.
        size: Which of :data:`SIZES` was asked for, by its place there; None where none of them was.
    """

    kind: str
    label: str
    sweep: Sweep
    size: int | None = None


ALONE = ("quantization.rest=int6", "sparsity.target=0", "allocation=uniform")
"""Quantisation without pruning; what is not prunable is as small as in the budget's models."""


def _nearest(width: str) -> Point:
    settings = (f"quantization={width}", "quantization.rounding=nearest", *ALONE)
    sweep = Sweep("ours/size", "base", both=(*settings, 'hydra.sweeper.params.seed="0"'))  # no seed changes it
    return Point(NEAREST, f"{width[3:]} bits", sweep)


def _quantized(width: str, group: int | None) -> Point:
    groups = "whole rows" if group is None else f"groups of {group}"
    settings = (f"quantization={width}", f"quantization.group_size={'null' if group is None else group}", *ALONE)
    sweep = Sweep("ours/size", "base", both=(*settings, "calibration.propagation=sequential"), seconds=20.0)
    return Point(QUANTIZED, f"{width[3:]} bits, {groups}", sweep)


def _fitting(kind: str, size: int, preset: str, seconds: float, *settings: str) -> Point:
    demo, paper = (SIZES[scale][size] for scale in ("demo", "paper"))
    sweep = Sweep(
        "ours/size",
        "base",
        demo=(f"sparsity.megabytes={demo:g}",),
        paper=(f"sparsity.megabytes={paper:g}",),
        both=("sparsity=megabytes", *settings),
        preset=preset,
        seconds=seconds,
    )
    width = next((word.partition("=int")[2] for word in settings if "=int" in word), "")
    return Point(kind, f"{width} bits" if width else "", sweep, size)


POINTS = (
    *(_nearest(width) for width in ("int8", "int4", "int3", "int2")),
    *(_quantized(width, 128) for width in ("int8", "int4", "int3")),
    *(_quantized("int2", group) for group in (128, None)),
    *(
        _fitting(
            PRUNED, size, "best_oneshot", 60.0, "allocation=uniform", "quantization=float16", "quantization.rest=int6"
        )
        for size in range(4)
    ),
    *(
        _fitting(
            BOTH, size, "best_oneshot", 60.0, "allocation=uniform", f"quantization={width}", "quantization.rest=int6"
        )
        for size, width in enumerate(BOTH_WIDTHS)
    ),
    *(_fitting(BUDGET, size, "smallest", 125.0) for size in range(4)),
)
SWEEPS = (*(point.sweep for point in POINTS), *speed.WITH_TABLE2)

SHOWN_IN_PAPER = ("Kind", "Model", "WER %", "MB", "Bits", "Reached", "Seeds", "Front")


def asked(point: Point, scale: Scale) -> str:
    """What tells a point from others of its curve, with the size that was asked for."""
    target = jobs(point.sweep, scale)[0].config.sparsity.get("megabytes")
    return ", ".join(part for part in (point.label, target and f"at most {target:g} MB") if part)


def read_point(point: Point, scale: Scale) -> pandas.DataFrame:
    """Read the runs of a point.

    Raises:
        UserError: A run is missing, or does not say its bytes.
    """
    runs = read([point.sweep], scale)
    if "bytes" not in runs or runs["bytes"].isna().any():
        raise UserError(f"{runs['run'].iloc[0]} does not say the bytes of its model; run it again with force=true")
    return runs


def measure(item: Item, scale: Scale) -> None:
    """Round the models of Table 2 and measure their bytes and WER, unless that is done.

    What it measured goes to ``size-measured.csv``.

    Raises:
        UserError: A run has no model.
    """
    found = _other_jobs(scale)
    folders = [job.folder for job in found]
    path = scale.folder / f"{item.name}-measured.csv"
    if measured_before(path, folders, ["bytes", "wer"]) is None:
        from experiments.ours.model_costs import measure_rounded  # imported late: --help does not wait for PyTorch

        write_measured(path, measure_rounded(typed(found[0].config), folders), folders)


def _other_jobs(scale: Scale) -> list[Job]:
    return [job for sweep in speed.WITH_TABLE2 for job in jobs(sweep, scale)]


def make(item: Item, scale: Scale) -> Result:
    """Draw the figure and write the table.

    Raises:
        UserError: A run or the measurement is missing.
    """
    own = {point: read_point(point, scale) for point in POINTS}
    others = [read([sweep], scale) for sweep in speed.WITH_TABLE2]
    path = scale.folder / f"{item.name}-measured.csv"
    measured = measured_before(path, [job.folder for job in _other_jobs(scale)], ["bytes", "wer"])
    if measured is None:
        raise UserError(f"the models are not measured; measure them: ./reproduce.sh {scale.name} {item.name}")
    runs = pandas.concat([*own.values(), *others], ignore_index=True)
    check_comparable(runs, MODEL_KEYS | DATA_KEYS)
    dense = measured[~measured["run"].isin(runs["run"])]
    values = [
        {"kind": DENSE, "label": row["rounding"], "bytes": row["bytes"], "bits": row["bits"], "wer_mean": row["wer"]}
        | {"wer_dense": runs["wer_dense"].iloc[0]}
        for row in dense.to_dict("records")
    ]
    for point, chosen in own.items():
        values.append(values_of(point, chosen, scale))
    for chosen in others:
        for rounding, rows in measured[measured["run"].isin(chosen["run"])].groupby("rounding", sort=False):
            rounded = rows.set_index("run").loc[chosen["run"]]
            values.append(
                {"kind": f"{OTHERS}, {rounding}", "label": _method_name(chosen), "method": _method(chosen)}
                | summarize(chosen.assign(wer=rounded["wer"].to_numpy()), scale.folder)
                | {"bytes": rounded["bytes"].mean(), "bits": rounded["bits"].iloc[0], "seconds": seconds_of(chosen)}
            )
    numbers = pandas.DataFrame(values)
    numbers["front"] = [
        not ((numbers["bytes"] <= row["bytes"]) & (numbers["wer_mean"] < row["wer_mean"])).any() for row in values
    ]
    plot(scale.folder / item.name, numbers)
    notes = [
        *describe(runs, scale),
        "MB: 10^6 bytes of the whole weights file in bitmask format (dense, float32: of the plain checkpoint), all in "
        "it counted; mean over the seeds. WER: mean "
        "± standard deviation over the seeds.",
        "Front: no other model of the table has a lower WER in no more bytes.",
        f"{QUANTIZED.capitalize()}, {PRUNED} and {BOTH}: experiment=best_oneshot; the latter two have the lowest "
        f"uniform sparsity that fits into the megabytes asked for. {PRUNED.capitalize()}: numbers in float16. "
        f"{BOTH.capitalize()}: the bits were chosen on the development set. {BUDGET.capitalize()}: "
        f"experiment=smallest. {NEAREST.capitalize()}: without calibration, groups of 128. None of them is fine-tuned.",
        f"{OTHERS}: its models, fine-tuned with labels as the column updates says, then rounded to the nearest "
        "and evaluated anew: float16, or int8 (convolutions and matrices, with a scale a row; biases and norms in "
        "float16).",
    ]
    beside = [
        "Bits: nominal, of a weight of the transformer's matrices. Reached: its zeros and weights that were cut. "
        "Seconds: of pruning, rounding and recovery, without fine-tuning; those of pieces out of the cache included.",
    ]
    table = pandas.DataFrame([_printed(row, values[0]["bytes"]) for row in numbers.to_dict("records")])
    result = write_table(item, scale, table, notes, numbers, SHOWN_IN_PAPER, beside)
    return Result(result.notes, [*item.files(scale, "png", "pdf"), *result.files], table)


def values_of(point: Point, runs: pandas.DataFrame, scale: Scale) -> dict[str, Any]:
    """The CSV's columns of a point."""
    return (
        {"kind": point.kind, "label": asked(point, scale), "method": "sparsewav"}
        | summarize(runs, scale.folder)
        | {"bytes": runs["bytes"].mean(), "bytes_most": runs["bytes"].max(), "bits": runs["bits"].mean()}
        | {"target_megabytes": runs["target_megabytes"].iloc[0] if "target_megabytes" in runs else None}
        | {"seconds": seconds_of(runs)}
    )


def seconds_of(runs: pandas.DataFrame) -> float:
    """Mean seconds of pruning."""
    return sum(row["prune"] for row in runs["seconds"]) / len(runs)


def _method(runs: pandas.DataFrame) -> str:
    return str(runs["method"].iloc[0])


def _method_name(runs: pandas.DataFrame) -> str:
    """The name of a row of Table 2, for ours with the sparsity reached."""
    names = {row.method: name for name, row in baselines.registered().items()}
    return names.get(_method(runs), f"SparseWAV, progressive, {reached(runs['achieved_sparsity'].mean())}")


def _printed(value: dict[str, Any], dense: float) -> dict[str, object]:
    """The cells of a point."""
    known = pandas.notna(value["seeds"])
    wer, deviation = 100 * value["wer_mean"], 100 * value["wer_deviation"]
    return {
        "Kind": value["kind"],
        "Model": value["label"],
        "WER %": f"{wer:.2f}" + (f" ± {deviation:.2f}" if pandas.notna(deviation) else ""),
        "MB": f"{value['bytes'] / 1e6:.2f}",
        "Of dense": f"{value['bytes'] / dense:.3f}",
        "Bits": f"{value['bits']:.2f}".rstrip("0").rstrip(".") if pandas.notna(value["bits"]) else None,
        "Reached": reached(value["achieved_sparsity"]) if known else None,
        "Updates": f"{value['updates']:.0f}" if known else None,
        "Seeds": f"{value['seeds']:.0f}" if known else None,
        "Seconds": f"{value['seconds']:.0f}" if known else None,
        "Front": "yes" if value["front"] else None,
    }
