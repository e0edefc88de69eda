"""Table 4 (ours): the ablation of one-shot methods beyond the paper's."""

import pandas

from experiments.ours.variants import RESAMPLES, VARIANTS, compare, layer_errors, read_edits
from experiments.results import Item, Result, describe
from experiments.sweeps import Scale, read
from experiments.tables import mean_and_deviation, write_table

SWEEPS = tuple(variant.one_shot for variant in VARIANTS)
ERRORS_AT = 0.75


def make(scale: Scale) -> Result:
    """Write ``table4``, and ``table4-differences.csv`` with every difference and interval.

    Raises:
        UserError: a run is missing.
    """
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
        row["Judgements"] = max(stages[-1].get("judge_evaluations", 0) for stages in runs["stages"])
        row["Seconds to prune"] = f"{seconds.mean():.1f} ({seconds.mean() / baseline_seconds:.1f} x)"
        rows.append(row)
    runs = pandas.concat(gathered)
    frame = pandas.DataFrame(rows)
    notes = [
        describe(runs, scale),
        f"Dense WER {100 * runs['wer_dense'].iloc[0]:.2f} %. WER as mean ± standard deviation over the calibration "
        "seeds; in brackets the difference to the first row in points, and its 95 % interval over "
        f"{RESAMPLES:,} bootstrap samples of the utterances, edits averaged over the seeds.",
        "A dash: what shows the worth of a part was run at 75 and 85 % alone.",
        "Every method prunes the same model with the same calibration sets; layer error: mean over the matrices of "
        "||WX − ŴX||² / ||WX||² on the calibration set.",
        "Seconds: calibration, allocation and solving, those of pieces out of the cache included.",
        *_what_did_not_help(differences),
        *(f"{variant.name}: {variant.note}" for variant in VARIANTS if variant.note),
    ]
    title = "Table 4 (ours): one-shot methods at the same sparsity"
    write_table(scale.folder, "table4", title, frame, notes)
    pandas.DataFrame(differences).to_csv(scale.folder / "table4-differences.csv", index=False)
    files = [scale.folder / name for name in ("table4.csv", "table4.md", "table4.tex", "table4-differences.csv")]
    return Result(title, notes, frame, files)


def _what_did_not_help(differences: list[dict[str, object]]) -> list[str]:
    """A sentence on the methods that are nowhere better than the first, with the interval below zero."""
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


ITEM = Item(SWEEPS, make)
