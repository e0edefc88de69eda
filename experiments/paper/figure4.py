"""Figure 4: one-shot pruning of large models that were fine-tuned on 10 minutes, 100 and 960 hours of speech."""

from experiments.paper.curves import mean_increase, points_of, write_points
from experiments.plots import Curve, plot_curves
from experiments.results import Item, Result, describe
from experiments.sweeps import Scale, Sweep, read

ROLES = {"large_10m": "10m", "large_100h": "100h", "large_960h": "960h"}
"""By the role of each model, the data that the paper's model was fine-tuned on."""

SWEEPS = tuple(Sweep("paper/curve_one_shot", role) for role in ROLES)


def make(item: Item, scale: Scale) -> Result:
    """Draw the figure."""
    runs = read(item.sweeps, scale)
    curves, increases = [], {}
    for role, hours in ROLES.items():
        chosen = runs[runs["role"] == role]
        dense = chosen["wer_dense"].iloc[0]
        label = f"{chosen['model'].iloc[0]} ({100 * dense:.1f} %; paper: {hours})"
        curves.append(Curve(label, points_of(chosen), dense))
        increases[label] = mean_increase(chosen)
    plot_curves(scale.folder / item.name, "Large models, more and more training data", curves)
    write_points(item, scale, runs)
    sparsities = [sparsity for sparsity in next(iter(increases.values())).index if sparsity >= 0.5]
    losses = [[increase[sparsity] for increase in increases.values()] for sparsity in sparsities]
    ordered = [loss for loss in losses if loss == sorted(loss, reverse=True)]
    notes = [
        describe(runs, scale),
        "Bands: one standard deviation over the seeds. Dashed: each model's dense WER.",
        "Paper: the better the dense model, the smaller the loss by pruning. Ours, from 50 % on: the same order at "
        f"{len(ordered)} of {len(sparsities)} sparsities; at 70 % "
        + ", ".join(f"{label.split()[0]} {increase[0.7]:+.2f}" for label, increase in increases.items())
        + " points.",
    ]
    return Result(notes, item.files(scale, "png", "pdf", "csv"))
