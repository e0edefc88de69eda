"""Table 1: the ablation of the method's parts at 75 % sparsity."""

import pandas

from experiments.differences import Edits, compare, describe_interval, read_edits
from experiments.results import EQUAL, Item, Result, describe, paper, reached, signed, summarize
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


SHOWN_IN_PAPER = ("Method", "Paper WER %", "Our WER %", "Reached", "Updates")


def make(item: Item, scale: Scale) -> Result:
    """Write the table and say whether the paper's ordering holds."""
    runs = read(item.sweeps, scale)
    published = paper()["table1"]
    dense = runs["wer_dense"].iloc[0]
    name = f"{runs['model'].iloc[0]}, dense"
    rows: list[dict[str, object]] = [
        {"Method": name, "Paper WER %": published["dense"], "Our WER %": f"{100 * dense:.2f}"}
    ]
    values: list[dict[str, object]] = [{"method": name, "paper_wer": published["dense"] / 100, "wer_dense": dense}]
    above: tuple[Edits, float] | None = None
    steps: list[str] = []
    for key, (method, saliency, allocation, strategy) in ROWS.items():
        choices = pandas.Series({"saliency": saliency, "allocation": allocation, "finetune_strategy": strategy})
        chosen = runs[(runs[choices.index] == choices).all(axis=1)]
        value = {"method": method, "paper_wer": published[key] / 100} | summarize(chosen, scale.folder)
        row = {
            "Method": method,
            "Paper WER %": published[key],
            "Our WER %": mean_and_deviation(100 * chosen["wer"]),
            "Reached": reached(value["achieved_sparsity"]),
            "Updates": value["updates"],
            "Seeds": value["seeds"],
        }
        edits = read_edits(chosen)
        if above is not None:
            difference, low, high = compare(edits, above[0])
            more = value["achieved_sparsity"] - above[1]
            steps.append("yes" if high < 0 else "no" if low > 0 else "not separated")
            row["Against the row above"] = (
                f"{signed(100 * difference)} ({signed(100 * low)} to {signed(100 * high)})"
                + ("" if abs(more) < EQUAL else f", at {signed(100 * more, 1)} points of sparsity †")
            )
            row["Better, as in the paper"] = steps[-1]
            value |= {"difference": difference, "low": low, "high": high, "difference_of_sparsity": more}
        rows.append(row)
        values.append(value)
        above = edits, value["achieved_sparsity"]
    frame = pandas.DataFrame(rows).astype({"Seeds": "Int64", "Updates": "Int64"})
    tuned = pandas.DataFrame(values).iloc[-2:]
    after, progressive = (signed(100 * (wer - dense)) for wer in tuned["wer_mean"])
    same = "the same number of" if tuned["updates"].nunique() == 1 else "different numbers of"
    notes = [
        *describe(runs, scale),
        "WER: mean ± standard deviation over the seeds.",
        f"The paper's model is wav2vec2-base-100h. Its ordering holds in {steps.count('yes')} of {len(steps)} steps, "
        f"is reversed in {steps.count('no')}, and is not separated from noise in {steps.count('not separated')}, by "
        f"whether the interval of the difference to the row above leaves out 0. {describe_interval(edits)}",
        f"Asked for: {reached(runs['target_sparsity'].iloc[0])}. The paper's progression does not know the matrices' "
        "sizes, and reaches another sparsity.",
        f"Above the dense model's WER, in points: after tuning {after}, after progressive tuning {progressive}; both "
        f"had {same} updates.",
    ]
    beside = ["Differences to the row above in points, with their interval in brackets."]
    if frame.to_string().count("†"):
        beside.append("† Not at the same sparsity as the row above.")
    return write_table(item, scale, frame, notes, pandas.DataFrame(values), SHOWN_IN_PAPER, beside)
