"""The accuracy table: an ablation of one-shot methods beyond the paper's."""

from typing import Any

import pandas

from experiments.differences import compare, describe_interval, read_edits
from experiments.ours.variants import VARIANTS, layer_error, recovery_updates
from experiments.results import EQUAL, Item, Result, describe, percent, seeds_of, signed, summarize
from experiments.sweeps import DATA_KEYS, MODEL_KEYS, Scale, check_comparable, read
from experiments.tables import mean_and_deviation, write_table

SWEEPS = tuple(variant.one_shot for variant in VARIANTS)
ERRORS_AT = 0.75


SHOWN_IN_PAPER = ("One-shot method", "75 %", "Reached − asked", "Seeds", "Updates")


def make(item: Item, scale: Scale) -> Result:
    """Write the table; its CSV has a row for every method and sparsity, with the difference and its interval."""
    runs = {variant: read([sweep], scale) for variant, sweep in zip(VARIANTS, SWEEPS, strict=True)}
    everything = pandas.concat(runs.values(), ignore_index=True)
    check_comparable(everything, MODEL_KEYS | DATA_KEYS)
    first = {target: (read_edits(chosen), chosen) for target, chosen in runs[VARIANTS[0]].groupby("target_sparsity")}
    targets = sorted(set(everything["target_sparsity"]))
    first_seconds = float("nan")
    rows: list[dict[str, object]] = []
    values: list[dict[str, Any]] = []
    for variant, own in runs.items():
        seconds = pandas.Series([run["prune"] for run in own["seconds"]])
        if variant is VARIANTS[0]:
            first_seconds = seconds.mean()
        row: dict[str, object] = {"One-shot method": variant.name}
        off: list[float] = []
        for target in targets:
            chosen = own[own["target_sparsity"] == target]
            row[percent(target)] = None
            if chosen.empty:
                continue
            value: dict[str, Any] = {"method": variant.name} | summarize(chosen, scale.folder)
            value["layer_error"] = layer_error(chosen)
            value["recovery_updates"] = max(map(recovery_updates, chosen["stages"]))
            off.append(value["achieved_sparsity"] - value["target_sparsity"])
            cell = mean_and_deviation(100 * chosen["wer"])
            if variant is not VARIANTS[0] and target in first:
                edits, compared = first[target]
                difference, low, high = compare(read_edits(chosen), edits)
                more = value["achieved_sparsity"] - compared["achieved_sparsity"].mean()
                value |= {"difference": difference, "low": low, "high": high, "difference_of_sparsity": more}
                shown = "; ".join((signed(100 * difference), f"{signed(100 * low)} to {signed(100 * high)}"))
                cell += f" ({shown})" + ("" if abs(more) < EQUAL else " †")
            row[percent(target)] = cell
            values.append(value)
        least, most = signed(100 * min(off), 1), signed(100 * max(off), 1)
        errors = [
            value["layer_error"]
            for value in values
            if (value["method"], value["target_sparsity"]) == (variant.name, ERRORS_AT)
        ]
        row[f"Layer error at {percent(ERRORS_AT)}"] = f"{errors[0]:.4f}" if errors else None
        row["Reached − asked"] = least if least == most else f"{least} to {most}"
        row["Seeds"] = seeds_of(own, ["target_sparsity"]).split(" seed")[0]
        tuned, recovered = ", ".join(map(str, sorted(set(own["updates"])))), max(map(recovery_updates, own["stages"]))
        row["Updates"] = f"{tuned} + {recovered:,} without labels" if recovered else tuned
        row["Evaluations"] = max(stages[-1].get("divergence_evaluations", 0) for stages in own["stages"])
        row["Seconds to prune"] = f"{seconds.mean():.1f} ({seconds.mean() / first_seconds:.1f} x)"
        rows.append(row)
    frame, numbers = pandas.DataFrame(rows), pandas.DataFrame(values)
    unequal = numbers["difference_of_sparsity"].abs() >= EQUAL
    edits, _ = next(iter(first.values()))
    notes = [
        *describe(everything, scale),
        f"Dense WER {100 * everything['wer_dense'].iloc[0]:.2f} %. WER: mean ± standard deviation over the seeds; in "
        f"brackets the difference to the first row in points, and its interval. {describe_interval(edits)}",
        *(["† Not at the sparsity that the first row reaches."] if unequal.any() else []),
        "A dash: not run at this sparsity. Reached − asked: sparsity, in points.",
        *_what_did_not_help(numbers[~unequal].dropna(subset=["high"])),
    ]
    beside = [
        "Updates: of the fine-tuning, with labels; without labels the whole model learned the dense one's outputs.",
        "Layer error: mean over the matrices of ||WX − ŴX||² / ||WX||² on the calibration set.",
        "Evaluations: how often the allocation measured the output divergence of a pruned model.",
        "Seconds: calibration, allocation and solving, those of pieces out of the cache included.",
    ]
    return write_table(item, scale, frame, notes, numbers, SHOWN_IN_PAPER, beside)


def _what_did_not_help(frame: pandas.DataFrame) -> list[str]:
    """A sentence on the methods that are better than the first at no sparsity, with the interval below zero."""
    if frame.empty:
        return []
    better = frame[frame["high"] < 0].groupby("method").size()
    worse = frame[frame["low"] > 0].groupby("method").size()
    names = [name for name in dict.fromkeys(frame["method"]) if name not in better]
    if not names:
        return []
    run = frame.groupby("method").size()
    listed = "; ".join(f"{name} (worse at {worse.get(name, 0)} of {run[name]})" for name in names)
    return [
        "Did not help, better than the first row at none of the sparsities that both reach, with the interval below "
        f"zero: {listed}."
    ]
