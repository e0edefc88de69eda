"""Table 2: our models at 85 % sparsity beside the other compression methods."""

import pandas

from experiments.paper import baselines
from experiments.results import Item, Result, describe, paper
from experiments.sweeps import Scale, Sweep, read
from experiments.tables import mean_and_deviation, write_table

OURS = tuple(
    Sweep("paper/compression", role, demo=(*baselines.DEMO, *baselines.THREE_SEEDS))
    for role in ("base", "wavlm", "hubert")
)
SWEEPS = (*OURS, *baselines.SWEEPS)

DENSE = {"wav2vec2 Base": "base", "HuBERT Base": "hubert", "WavLM Base+": "wavlm"}
PRUNED = {"SparseWAV2VEC2": "base", "SparseWAVLM+": "wavlm", "Ours, HuBERT": "hubert"}
"""The rows of SparseWAV with their model's role; the last one is not in the paper's table."""


def make(item: Item, scale: Scale) -> Result:
    """Write the table."""
    runs = read(item.sweeps, scale)
    published = {row["method"]: row for row in paper()["table2"]}
    methods = baselines.registered()
    names = [*(name for name in published if name not in PRUNED), *(name for name in methods if name not in published)]
    rows = []
    for name in [*names, *PRUNED]:
        row: dict[str, object] = {"Method": name}
        if name in published:
            row |= {
                "Paper params (M)": f"{published[name]['params']:.2f}",
                "Paper WER %": f"{published[name]['wer']:.2f}",
            }
        if name in DENSE:
            chosen = runs[(runs["role"] == DENSE[name]) & (runs["method"] == "sparsewav")].iloc[:1]
            row |= {
                "Our model": chosen["model"].iloc[0],
                "Our params (M)": f"{chosen['params_total'].iloc[0] / 1e6:.2f}",
                "Our WER %": f"{100 * chosen['wer_dense'].iloc[0]:.2f}",
            }
        elif name in PRUNED:
            row |= _measured(runs[(runs["role"] == PRUNED[name]) & (runs["method"] == "sparsewav")])
        elif name in methods:
            row |= _measured(runs[(runs["role"] == methods[name].role) & (runs["method"] == methods[name].method)])
        rows.append(row)
    frame = pandas.DataFrame(rows)
    notes = [
        describe(runs, scale),
        "Params: those that are not zero; left: of the dense model's. Ours are pruned to 85 % with progressive tuning; "
        "the other methods come as near to that as they can, and are tuned for recognition with as many updates. "
        "With ±: mean and standard deviation over the seeds of the calibration sample, or of the compression's "
        "order, where a run is short; else one seed. The tuning sees the same utterances in the same order. "
        "Training: updates x utterances of the compression + the tuning. GMAC/s: multiply-accumulates for a second of "
        "audio in an utterance of ten; in brackets without the zeros, which only hardware made for that leaves out.",
        baselines.note(runs, scale),
        *_orderings(frame),
        "A dash: not run here. Models and speech of the demo scale are not the paper's: compare within a column.",
    ]
    return write_table(item, scale, frame, notes)


def _measured(chosen: pandas.DataFrame) -> dict[str, str]:
    """The cells of one method's runs."""
    dense = chosen["compression"].iloc[0]
    total = dense["params_dense"] if isinstance(dense, dict) else chosen["params_total"].iloc[0]
    executed, nonzero = chosen["macs_per_second"].mean() / 1e9, chosen["macs_per_second_nonzero"].mean() / 1e9
    return {
        "Our model": chosen["model"].iloc[0],
        "Our params (M)": f"{chosen['params_nonzero'].mean() / 1e6:.2f}",
        "Left": f"{100 * chosen['params_nonzero'].mean() / total:.1f} %",
        "Our WER %": mean_and_deviation(100 * chosen["wer"]),
        "Training": baselines.cost(chosen.iloc[0]),
        "Seconds": f"{sum(row['prune'] + row['finetune'] for row in chosen['seconds']) / len(chosen):,.0f}",
        "GMAC/s": f"{executed:.3f}" + (f" ({nonzero:.3f})" if nonzero < executed else ""),
    }


def _orderings(frame: pandas.DataFrame) -> list[str]:
    """A sentence on the pairs of methods that have the same order here and in the paper."""
    both = frame.dropna(subset=["Our WER %", "Paper WER %"])
    both = both[~both["Method"].isin(DENSE)]
    ours = {row["Method"]: float(str(row["Our WER %"]).split()[0]) for _, row in both.iterrows()}
    theirs = {row["Method"]: float(row["Paper WER %"]) for _, row in both.iterrows()}
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
