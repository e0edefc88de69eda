"""Table 2: our models at 85 % sparsity beside the other compression methods."""

from typing import Any

import pandas

from experiments.paper import baselines
from experiments.results import EQUAL, Item, Result, describe, paper, reached, summarize
from experiments.sweeps import Scale, Sweep
from experiments.tables import mean_and_deviation, write_table

OURS = tuple(
    Sweep("paper/compression", role, demo=(*baselines.DEMO, *baselines.THREE_SEEDS))
    for role in ("base", "wavlm", "hubert")
)
STRUCTURED = baselines.structured(0.235)
"""As many parameters as the prior methods have: 22.3 of 94.7 millions (Table 2 of the paper)."""
SWEEPS = (*OURS, STRUCTURED, *baselines.SWEEPS)

DENSE = {"wav2vec2 Base": "base", "HuBERT Base": "hubert", "WavLM Base+": "wavlm"}
PRUNED = {
    "SparseWAV2VEC2": ("base", "sparsewav"),
    "SparseWAVLM+": ("wavlm", "sparsewav"),
    "Ours, HuBERT": ("hubert", "sparsewav"),
    "SparseWAV, structured": ("base", baselines.STRUCTURED),
}
"""The rows of SparseWAV with their model's role and method; the last two are not in the paper's table."""


SHOWN_IN_PAPER = ("Method", "Paper WER %", "Our WER %", "Reached", "Seeds", "Training")


def make(item: Item, scale: Scale) -> Result:
    """Write the table."""
    runs = baselines.read_methods(item.sweeps, scale)
    published = {row["method"]: row for row in paper()["table2"]}
    methods = baselines.registered()
    names = [*(name for name in published if name not in PRUNED), *(name for name in methods if name not in published)]
    rows: list[dict[str, object]] = []
    values: list[dict[str, object]] = []
    for name in [*names, *PRUNED]:
        row: dict[str, object] = {"Method": name}
        value: dict[str, object] = {"method": name}
        if name in published:
            params, wer = published[name]["params"], published[name]["wer"]
            row |= {"Paper params (M)": f"{params:.2f}", "Paper WER %": f"{wer:.2f}"}
            value |= {"paper_params": 1e6 * params, "paper_wer": wer / 100}
        if name in DENSE:
            chosen = runs[(runs["role"] == DENSE[name]) & (runs["method"] == "sparsewav")].iloc[0]
            row |= {
                "Our model": chosen["model"],
                "Our params (M)": f"{chosen['params_total'] / 1e6:.2f}",
                "Our WER %": f"{100 * chosen['wer_dense']:.2f}",
            }
            value |= {"model": chosen["model"], "params": chosen["params_total"], "wer_dense": chosen["wer_dense"]}
        else:
            role, method = PRUNED.get(name, ("", ""))
            if name in methods:
                role, method = methods[name].role, methods[name].method
            chosen = runs[(runs["role"] == role) & (runs["method"] == method)]
            if len(chosen):
                value |= _measured(chosen, scale)
                row |= _printed(chosen, value)
        rows.append(row)
        values.append(value)
    frame, numbers = pandas.DataFrame(rows), pandas.DataFrame(values)
    compressed = numbers.dropna(subset=["achieved_sparsity"])
    low, high = compressed["achieved_sparsity"].min(), compressed["achieved_sparsity"].max()
    same = compressed["updates"].nunique() == 1
    notes = [
        *describe(runs, scale),
        "Reached: zeros and weights that were cut, of the "
        "transformer's matrices; "
        + (
            "the same for all methods."
            if high - low < EQUAL
            else f"from {reached(low)} to {reached(high)}, so that methods are not compared at the same sparsity."
        ),
        f"Fine-tuning: ours {_strategies(runs, ours=True)}, the other methods {_strategies(runs, ours=False)}, "
        f"{'all' if same else 'NOT all'} with as many updates. WER: mean, with ± and standard "
        "deviation over the seeds where there are several; a seed draws the calibration sample, or the order of the "
        "compression. The tuning sees the same utterances in the same order.",
        "Training: updates x utterances of the compression + the tuning.",
        baselines.note(runs),
        *_orderings(numbers),
        "A dash: not run here. Models and speech of the demo scale are not the paper's: compare within a column.",
    ]
    beside = [
        "Params: those that are not zero; left: of the dense model's. GMAC/s: multiply-accumulates for a second of "
        "audio in an utterance of ten; in brackets without the zeros, which only hardware made for that leaves out.",
    ]
    return write_table(item, scale, frame, notes, numbers, SHOWN_IN_PAPER, beside)


def _strategies(runs: pandas.DataFrame, *, ours: bool) -> str:
    return " and ".join(sorted(set(runs.loc[runs["method"].isin(baselines.OURS) == ours, "finetune_strategy"])))


def _measured(chosen: pandas.DataFrame, scale: Scale) -> dict[str, object]:
    """The CSV's columns of one method's runs."""
    compression = chosen["compression"].iloc[0]
    spent = [row["prune"] + row["finetune"] for row in chosen["seconds"]]
    params = chosen["params_nonzero"].mean()
    dense = compression["params_dense"] if isinstance(compression, dict) else chosen["params_total"].iloc[0]
    return {
        "model": chosen["model"].iloc[0],
        "params": params,
        "left": params / dense,
        **summarize(chosen, scale.folder),
        "compression_updates": compression["updates"] if isinstance(compression, dict) else 0,
        "seconds": sum(spent) / len(spent),
        "macs_per_second": chosen["macs_per_second"].mean(),
        "macs_per_second_nonzero": chosen["macs_per_second_nonzero"].mean(),
    }


def _printed(chosen: pandas.DataFrame, value: dict[str, Any]) -> dict[str, object]:
    """The cells of one method's runs."""
    executed, nonzero = value["macs_per_second"] / 1e9, value["macs_per_second_nonzero"] / 1e9
    return {
        "Our model": value["model"],
        "Our params (M)": f"{value['params'] / 1e6:.2f}",
        "Left": reached(value["left"]),
        "Our WER %": mean_and_deviation(100 * chosen["wer"]),
        "Reached": reached(value["achieved_sparsity"]),
        "Training": baselines.cost(chosen.iloc[0]),
        "Seeds": str(value["seeds"]),
        "Seconds": f"{value['seconds']:,.0f}",
        "GMAC/s": f"{executed:.3f}" + (f" ({nonzero:.3f})" if nonzero < executed else ""),
    }


def _orderings(frame: pandas.DataFrame) -> list[str]:
    """A sentence on the pairs of methods that have the same order here and in the paper."""
    both = frame.dropna(subset=["wer_mean", "paper_wer"]).set_index("method")
    ours, theirs = both["wer_mean"].to_dict(), both["paper_wer"].to_dict()
    names = list(ours)
    pairs = [(a, b) for index, a in enumerate(names) for b in names[index + 1 :]]
    if not pairs:
        return []
    reversed_ = [(a, b) for a, b in pairs if (ours[a] - ours[b]) * (theirs[a] - theirs[b]) < 0]
    text = f"Of the {len(pairs)} pairs of methods in both columns {len(pairs) - len(reversed_)} have the paper's order"
    if reversed_:
        text += "; the others are " + ", ".join(f"{a} and {b}" for a, b in reversed_)
    others = [name for name in names if name not in PRUNED]
    best = all(ours[name] > max(ours[mine] for mine in PRUNED if mine in ours) for name in others)
    return [f"{text}. Both of ours better than every other method: {'yes' if best else 'no'} (paper: yes)."]
