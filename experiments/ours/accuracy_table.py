"""The accuracy table: an ablation of one-shot methods beyond the paper's."""

from dataclasses import replace

import pandas

from experiments.ours.variants import RESAMPLES, VARIANTS, compare, layer_errors, read_edits
from experiments.results import Item, Result, describe
from experiments.sweeps import Scale, read
from experiments.tables import mean_and_deviation, write_table
from sparsewav.files import write_file

SWEEPS = tuple(variant.one_shot for variant in VARIANTS)
ERRORS_AT = 0.75


def make(item: Item, scale: Scale) -> Result:
    """Write the table, and ``accuracy_table-differences.csv`` with every difference and interval."""
    baseline = read_edits(SWEEPS[0], scale)
    baseline_seconds = float("nan")
    rows, differences, gathered = [], [], []
    for variant, sweep in zip(VARIANTS, SWEEPS, strict=True):
        runs = read([sweep], scale)
        gathered.append(runs)
        edits = read_edits(sweep, scale)
        seconds = pandas.Series([run["prune"] for run in runs["seconds"]])
        row: dict[str, object] = {"One-shot method": variant.name}
        for sparsity, chosen in runs.groupby("target_sparsity"):
            cell = mean_and_deviation(100 * chosen["wer"])
            if variant is not VARIANTS[0]:
                difference, low, high = (100 * value for value in compare(edits, baseline, float(str(sparsity))))
                cell += f" ({difference:+.2f}; {low:+.2f} to {high:+.2f})"
                differences.append(
                    {"method": variant.name, "sparsity": sparsity, "difference": difference, "low": low, "high": high}
                )
            row[f"{float(str(sparsity)):.0%}"] = cell
        if variant is VARIANTS[0]:
            baseline_seconds = seconds.mean()
        row["Layer error at 75 %"] = f"{layer_errors(sweep, scale)[ERRORS_AT]:.4f}"
        row["Sparsity reached at 75 %"] = (
            f"{runs.loc[runs['target_sparsity'] == ERRORS_AT, 'achieved_sparsity'].mean():.4f}"
        )
        row["Evaluations"] = max(stages[-1].get("divergence_evaluations", 0) for stages in runs["stages"])
        row["Seconds to prune"] = f"{seconds.mean():.1f} ({seconds.mean() / baseline_seconds:.1f} x)"
        rows.append(row)
    runs = pandas.concat(gathered)
    frame = pandas.DataFrame(rows)
    notes = [
        describe(runs, scale),
        f"Dense WER {100 * runs['wer_dense'].iloc[0]:.2f} %. WER as mean ± standard deviation over the calibration "
        "seeds; in brackets the difference to the first row in points, and its 95 % interval over "
        f"{RESAMPLES:,} bootstrap samples of the utterances, edits averaged over the seeds.",
        "A dash: a method that shows what one part is worth was run at 75 and 85 % alone.",
        "Every method prunes the same model with the same calibration sets; layer error: mean over the matrices of "
        "||WX − ŴX||² / ||WX||² on the calibration set.",
        "Evaluations: how often the allocation measured the output divergence of a pruned model.",
        "Seconds: calibration, allocation and solving, those of pieces out of the cache included.",
        *_what_did_not_help(differences),
    ]
    result = write_table(item, scale, frame, notes)
    every_difference = scale.folder / f"{item.name}-differences.csv"
    with write_file(every_difference) as path:
        pandas.DataFrame(differences).to_csv(path, index=False)
    return replace(result, files=[*result.files, every_difference])


def _what_did_not_help(differences: list[dict[str, object]]) -> list[str]:
    """A sentence on the methods that are better than the first at no sparsity, with the interval below zero."""
    frame = pandas.DataFrame(differences)
    if frame.empty:
        return []
    better = frame[frame["high"] < 0].groupby("method").size()
    worse = frame[frame["low"] > 0].groupby("method").size()
    names = [name for name in dict.fromkeys(frame["method"]) if name not in better]
    if not names:
        return []
    run = frame.groupby("method").size()
    listed = "; ".join(f"{name} (worse at {worse.get(name, 0)} of {run[name]})" for name in names)
    return [f"Did not help, at no sparsity better than the first row with the interval below zero: {listed}."]
