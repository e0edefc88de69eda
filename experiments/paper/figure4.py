"""Figure 4: one-shot pruning of large models that were fine-tuned on 10 minutes, 100 and 960 hours of speech."""

import math

from experiments.paper.curves import increase, point_notes, write_points
from experiments.plots import Curve, plot_curves
from experiments.results import EQUAL, Item, Result, describe, percent, signed
from experiments.sweeps import Scale, Sweep, read

ROLES = {"large_10m": "10m", "large_100h": "100h", "large_960h": "960h"}
"""By the role of each model, the data that the paper's model was fine-tuned on."""

COMPARED_FROM, EXAMPLE = 0.5, 0.7
"""Asked sparsities: from the first one on the order of the models is compared, for the second one it is printed."""

SWEEPS = tuple(Sweep("paper/curve_one_shot", role) for role in ROLES)


def make(item: Item, scale: Scale) -> Result:
    """Draw the figure."""
    runs = read(item.sweeps, scale)
    table = write_points(item, scale, runs)
    curves, increases = [], {}
    for role, hours in ROLES.items():
        chosen = runs[runs["role"] == role]
        name, dense = chosen["model"].iloc[0], chosen["wer_dense"].iloc[0]
        curves.append(Curve(f"{name} ({100 * dense:.1f} %; paper: {hours})", chosen, dense))
        increases[name] = increase(table[table["model"] == name])
    plot_curves(scale.folder / item.name, "Large models, more and more training data", curves)
    sparsities = [sparsity for sparsity in next(iter(increases.values())).index if sparsity >= COMPARED_FROM]
    losses = [[each[sparsity] for each in increases.values()] for sparsity in sparsities]
    ordered = [loss for loss in losses if loss == sorted(loss, reverse=True)]
    asked = table.groupby("target_sparsity")["achieved_sparsity"]
    apart = (asked.max() - asked.min()).max()
    notes = [
        *describe(runs, scale),
        *point_notes(table),
        "Dashed: each model's dense WER.",
        "Paper: the better the dense model, the smaller the loss by pruning. Ours, "
        f"from {percent(COMPARED_FROM)} asked for: the same order at {len(ordered)} of {len(sparsities)} sparsities; "
        + "; ".join(
            f"at {percent(sparsity)} "
            + ", ".join(f"{name} {signed(each[sparsity])}" for name, each in increases.items())
            for sparsity in sparsities
            if math.isclose(sparsity, EXAMPLE)
        )
        + (
            "."
            if apart < EQUAL
            else f". At one asked sparsity the models reach sparsities up to {100 * apart:.1f} points apart."
        ),
    ]
    return Result(notes, item.files(scale, "png", "pdf", "csv"))
