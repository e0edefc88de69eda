"""Figures 1 to 3: WER over sparsity of one model, one-shot, fine-tuned and progressively fine-tuned."""

import pandas

from experiments.plots import Curve, plot_curves
from experiments.results import Item, Result, describe, paper
from experiments.sweeps import MODELS, Scale, Sweep, read
from sparsewav.files import write_file

STRATEGIES = {"none": "one-shot", "one_pass": "fine-tuned", "progressive": "progressive"}


def sweeps(role: str) -> tuple[Sweep, ...]:
    """The three curves of one model; ``role`` is a key of :data:`~experiments.sweeps.MODELS`."""
    return (
        Sweep("paper/curve_one_shot", role),
        Sweep("paper/curve_one_pass", role, demo=("training=demo_short",)),
        Sweep("paper/curve_progressive", role, demo=("training=demo_short",)),
    )


def make(item: Item, scale: Scale) -> Result:
    """Draw the figure of the one model that the item's sweeps are about."""
    runs, role = read(item.sweeps, scale), item.sweeps[0].role
    curves = []
    for strategy, label in STRATEGIES.items():
        points = points_of(runs[runs["finetune_strategy"] == strategy])
        if strategy == "progressive":
            # Where there is no earlier stage, progressive tuning is one-pass tuning: both curves have the same runs.
            tuned = points_of(runs[runs["finetune_strategy"] == "one_pass"])
            points = pandas.concat([tuned[tuned["sparsity"] < points["sparsity"].min()].iloc[-1:], points])
        curves.append(Curve(label, points, runs["wer_dense"].iloc[0]))
    title = f"{runs['model'].iloc[0]} (paper: {MODELS['paper'][role]})"
    plot_curves(scale.folder / item.name, title, curves)
    write_points(item, scale, runs)
    return Result([describe(runs, scale), _updates(runs), *_claims(runs, role)], item.files(scale, "png", "pdf", "csv"))


def points_of(runs: pandas.DataFrame) -> pandas.DataFrame:
    """The columns that a curve is drawn from, by rising sparsity."""
    return runs.rename(columns={"target_sparsity": "sparsity"})[["sparsity", "wer"]].sort_values("sparsity")


def write_points(item: Item, scale: Scale, runs: pandas.DataFrame) -> None:
    """Write ``<item>.csv`` with the WER over the seeds for every model, strategy and sparsity."""
    keys = ["model", "finetune_strategy", "target_sparsity"]
    groups = runs.groupby(keys, sort=True)
    table = pandas.DataFrame(
        {
            "achieved_sparsity": groups["achieved_sparsity"].mean(),
            "updates": groups["updates"].first(),
            "seeds": groups["seed"].nunique(),
            "wer_dense": groups["wer_dense"].first(),
            "wer_mean": groups["wer"].mean(),
            "wer_deviation": groups["wer"].std(),
        }
    ).reset_index()
    (csv,) = item.files(scale, "csv")
    with write_file(csv) as path:
        table.to_csv(path, index=False, float_format="%.6g")


def mean_increase(runs: pandas.DataFrame) -> pandas.Series:
    """Mean of the pruned minus the dense WER in points, by target sparsity."""
    return 100 * (runs["wer"] - runs["wer_dense"]).groupby(runs["target_sparsity"]).mean()


def _updates(runs: pandas.DataFrame) -> str:
    tuned = runs[runs["finetune_strategy"] == "one_pass"].sort_values("target_sparsity")
    counts = ", ".join(f"{row.target_sparsity:g}: {row.updates:,}" for row in tuned.itertuples())
    return (
        f"Bands: one standard deviation over the seeds (one-shot); tuned points have one seed. Updates: {counts}; "
        "progressive tuning has as many in all. Below 80 % it has no earlier stage and is one-pass tuning."
    )


def _claims(runs: pandas.DataFrame, role: str) -> list[str]:
    """Sentences that compare the claims of the paper's text with our runs."""
    said = paper()["figures"]
    tuned = mean_increase(runs[runs["finetune_strategy"] == "one_pass"])
    shot = mean_increase(runs[runs["finetune_strategy"] == "none"])
    progressive = mean_increase(runs[runs["finetune_strategy"] == "progressive"])
    negligible, kept = said["negligible_up_to"], said["one_shot_keeps_up_to"]
    claims = [
        f"Paper: negligible loss up to {negligible:.0%} with tuning; ours: at most "
        f"{tuned[tuned.index <= negligible + 1e-9].max():+.2f} points.",
        f"Paper: the dense WER without tuning up to {kept:.0%}; ours: at most "
        f"{shot[shot.index <= kept + 1e-9].max():+.2f} points.",
    ]
    if role == "base":
        claims.append(
            f"Paper: {said['progressive_increase_at_90']:+.2f} points at 90 %, progressive; ours: "
            f"{progressive.loc[0.9]:+.2f} (one pass: {tuned.loc[0.9]:+.2f})."
        )
    else:
        claims.append(f"At 90 %: progressive {progressive.loc[0.9]:+.2f} points, one pass {tuned.loc[0.9]:+.2f}.")
    return claims
