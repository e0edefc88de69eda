"""Table 1: the ablation of the method's parts at 75 % sparsity."""

import math

import pandas

from experiments.results import Item, Result, describe, paper
from experiments.sweeps import Scale, Sweep, read
from experiments.tables import mean_and_deviation, write_table

SWEEPS = (Sweep("paper/ablation_one_shot", "base"), Sweep("paper/ablation_finetune", "base"))

ROWS = {
    "obs": ("OBS, uniform sparsity", "obs", "uniform", "none"),
    "mixed_sparsity": ("+ mixed sparsity", "obs", "hutchinson", "none"),
    "improved_saliency": ("++ improved saliency", "obs_first_order", "hutchinson", "none"),
    "one_pass": ("+++ post-pruning finetune", "obs_first_order", "hutchinson", "one_pass"),
    "progressive": ("++++ progress", "obs_first_order", "hutchinson", "progressive"),
}
"""By the key in ``paper.yaml``: name, saliency, allocation and fine-tuning strategy of each row."""


def make(item: Item, scale: Scale) -> Result:
    """Write the table and say whether the paper's ordering holds."""
    runs = read(item.sweeps, scale)
    published = paper()["table1"]
    dense = 100 * runs["wer_dense"].iloc[0]
    name = runs["model"].iloc[0]
    table = [
        {
            "Method": f"{name} (paper: wav2vec2-base-100h)",
            "Paper WER %": published["dense"],
            "Our WER %": f"{dense:.2f}",
        }
    ]
    above: pandas.Series | None = None
    steps: list[str] = []
    for key, (method, saliency, allocation, strategy) in ROWS.items():
        choices = pandas.Series({"saliency": saliency, "allocation": allocation, "finetune_strategy": strategy})
        chosen = runs[(runs[choices.index] == choices).all(axis=1)]
        wer = 100 * chosen.set_index("seed")["wer"].sort_index()
        row = {
            "Method": method,
            "Paper WER %": published[key],
            "Our WER %": mean_and_deviation(wer),
            "Seeds": len(wer),
            "Sparsity reached": f"{chosen['achieved_sparsity'].mean():.4f}",
            "Updates": int(chosen["updates"].iloc[0]),
        }
        if above is not None:
            # Paired: the same seed draws the same calibration set and the same probes in both rows.
            difference = wer - above
            steps.append(_verdict(difference))
            row["Against the row above"] = mean_and_deviation(difference)
            seeds = f"{(difference < 0).sum()} of {len(wer)} seeds"
            row["Better, as in the paper"] = f"{steps[-1]} (better in {seeds})"
        table.append(row)
        above = wer
    frame = pandas.DataFrame(table).astype({"Seeds": "Int64", "Updates": "Int64"})
    tuned = frame["Our WER %"].iloc[-2:].str.split().str[0].astype(float)
    notes = [
        describe(runs, scale),
        "WER as mean ± standard deviation over the calibration seeds; differences are paired by seed.",
        f"The paper's ordering holds in {steps.count('yes')} of {len(steps)} steps, is reversed in "
        f"{steps.count('no')}; {steps.count('not separated')} differ by less than two standard errors over the seeds.",
        "Rows do not all reach the same sparsity: the paper's progression does not know the matrices' sizes.",
        f"After tuning the WER is {tuned.iloc[0] - dense:.2f} points above the dense model's, after progressive tuning "
        f"{tuned.iloc[1] - dense:.2f}; both had the same number of updates: "
        f"{'yes' if frame['Updates'].iloc[-1] == frame['Updates'].iloc[-2] else 'no'}.",
    ]
    return write_table(item, scale, frame, notes)


def _verdict(difference: pandas.Series) -> str:
    """Whether a row is better than the one above by more than two standard errors of the mean over the seeds."""
    mean, error = difference.mean(), difference.std() / math.sqrt(len(difference))
    if len(difference) > 1 and abs(mean) <= 2 * error:
        return "not separated"
    return "yes" if mean < 0 else "no"
