"""Table 2: our models at 85 % sparsity beside the prior compression methods."""

import pandas

from experiments.results import Item, Result, describe, paper
from experiments.sweeps import Scale, Sweep, read
from experiments.tables import mean_and_deviation, write_table

SWEEPS = tuple(Sweep("compression", role, demo=("training.epochs=0.08",)) for role in ("base", "wavlm"))

OURS = {
    "wav2vec2 Base": ("base", "wer_dense", "params_total"),
    "WavLM Base+": ("wavlm", "wer_dense", "params_total"),
    "SparseWAV2VEC2": ("base", "wer", "params_nonzero"),
    "SparseWAVLM+": ("wavlm", "wer", "params_nonzero"),
}
"""Rows of the paper's table that we have a model for: its role, and the metrics that fill the row."""


def make(scale: Scale) -> Result:
    """Write ``table2``.

    Raises:
        UserError: a run is missing.
    """
    runs = read(SWEEPS, scale)
    rows = []
    for published in paper()["table2"]:
        row = {
            "Method": published["method"],
            "Paper params (M)": f"{published['params']:.2f}",
            "Paper WER %": f"{published['wer']:.2f}",
        }
        if published["method"] in OURS:
            role, wer, parameters = OURS[published["method"]]
            chosen = runs[runs["role"] == role]
            row |= {
                "Our model": chosen["model"].iloc[0],
                "Our params (M)": f"{chosen[parameters].mean() / 1e6:.2f}",
                "Our WER %": mean_and_deviation(100 * chosen[wer]),
            }
            if wer == "wer":
                row["Sparsity reached"] = f"{chosen['achieved_sparsity'].mean():.4f}"
                row["Updates"] = f"{chosen['updates'].iloc[0]:,}"
        rows.append(row)
    frame = pandas.DataFrame(rows)
    notes = [
        describe(runs, scale),
        "Params: those that are not zero. Ours are pruned to 85 % with progressive tuning.",
        "Prior methods and HuBERT were not run here: their figures are the paper's. At another scale than the paper's "
        "ours are of other models on other speech, and do not compare with them.",
    ]
    title = "Table 2: WER and parameters at 85 % transformer sparsity"
    write_table(scale.folder, "table2", title, frame, notes)
    return Result(title, notes, frame, [scale.folder / f"table2.{suffix}" for suffix in ("csv", "md", "tex")])


ITEM = Item(SWEEPS, make)
