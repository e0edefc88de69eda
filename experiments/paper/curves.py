"""Figures 1 to 3: WER over sparsity of one model, one-shot, fine-tuned and progressively fine-tuned."""

import pandas

from experiments.plots import Curve, plot_curves
from experiments.results import EQUAL, Item, Result, counted, describe, paper, percent, reached, signed, summarize
from experiments.sweeps import MODELS, Scale, Sweep, read
from experiments.tables import write_values

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
        points = runs[runs["finetune_strategy"] == strategy]
        if strategy == "progressive":
            # Where there is no earlier stage, progressive tuning is one-pass tuning: both curves have the same runs.
            tuned = runs[runs["finetune_strategy"] == "one_pass"]
            below = tuned.loc[tuned["target_sparsity"] < points["target_sparsity"].min(), "target_sparsity"]
            points = pandas.concat([tuned[tuned["target_sparsity"] == below.max()], points])
        curves.append(Curve(label, points, runs["wer_dense"].iloc[0]))
    title = f"{runs['model'].iloc[0]} (paper: {MODELS['paper'][role]})"
    plot_curves(scale.folder / item.name, title, curves)
    table = write_points(item, scale, runs)
    notes = [*describe(runs, scale), *point_notes(table), *_claims(table, role)]
    return Result(notes, item.files(scale, "png", "pdf", "csv"))


POINT = ["role", "method", "saliency", "solver", "allocation", "recovery", "finetune_strategy", "target_sparsity"]
"""Columns that the runs of one point of a curve agree in."""


def write_points(item: Item, scale: Scale, runs: pandas.DataFrame, **columns: str) -> pandas.DataFrame:
    """Write ``<item>.csv`` with a row a point, by model, strategy and sparsity, and return it.

    Args:
        item: The figure.
        scale: Its folder is where the file goes.
        runs: The runs of all points.
        columns: Names of further columns of ``runs`` that tell points apart, by their names in the CSV.
    """
    rows = []
    for _, chosen in runs.groupby([*columns.values(), *POINT], sort=False, dropna=False):
        named = {name: chosen[column].iloc[0] for name, column in columns.items()}
        strategy = {"model": chosen["model"].iloc[0], "finetune_strategy": chosen["finetune_strategy"].iloc[0]}
        rows.append(named | strategy | summarize(chosen, scale.folder))
    table = pandas.DataFrame(rows)
    write_values(item, scale, table)
    return table


def point_notes(table: pandas.DataFrame) -> list[str]:
    """Sentences on what the points of a figure are: the sparsity that was reached, updates and seeds."""
    off = table["achieved_sparsity"] - table["target_sparsity"]
    axis = "Horizontal axis: the sparsity that was reached, mean over the seeds"
    if max(off.max(), -off.min()) < EQUAL:
        axis += ", which is the one that was asked for"
    else:
        span = " to ".join(dict.fromkeys((signed(100 * off.min(), 1), signed(100 * off.max(), 1))))
        axis += f", {span} points from the one that was asked for"
    notes = [f"{axis}. Bands: one standard deviation over the seeds."]
    for strategy, points in table.groupby("finetune_strategy", sort=False):
        counts = sorted(set(points["seeds"]))
        seeds = counted(counts[0], "seed") if len(counts) == 1 else f"{counts[0]} to {counts[-1]} seeds"
        updates = sorted(set(zip(points["target_sparsity"], points["updates"], strict=True)))
        listed = ", ".join(f"{count:,} at {percent(target)}" for target, count in updates)
        tuning = f"; updates by the sparsity asked for: {listed}" if points["updates"].any() else ", no updates"
        notes.append(f"{STRATEGIES.get(str(strategy), str(strategy)).capitalize()}: {seeds}{tuning}.")
    return notes


def increase(table: pandas.DataFrame) -> pandas.Series:
    """Mean of the pruned minus the dense WER in points, by the sparsity asked for."""
    return 100 * (table["wer_mean"] - table["wer_dense"]).set_axis(table["target_sparsity"])


def _claims(table: pandas.DataFrame, role: str) -> list[str]:
    """Sentences that compare the claims of the paper's text with our runs."""
    said = paper()["figures"]
    by_strategy = {strategy: table[table["finetune_strategy"] == strategy] for strategy in STRATEGIES}
    negligible, kept = said["negligible_up_to"], said["one_shot_keeps_up_to"]
    claims = []
    for claim, strategy, limit in (
        ("negligible loss with tuning", "one_pass", negligible),
        ("the dense WER without tuning", "none", kept),
    ):
        # A mean over seeds may lie a hair beyond the limit that was met.
        below = by_strategy[strategy][by_strategy[strategy]["achieved_sparsity"] <= limit + EQUAL]
        claims.append(f"Paper: {claim} up to {percent(limit)}; ours: at most {signed(increase(below).max())} points.")
    ours = []
    for strategy, name in (("progressive", "progressive"), ("one_pass", "one pass")):
        last = by_strategy[strategy].sort_values("target_sparsity").iloc[-1:]
        ours.append(
            f"{name} {signed(increase(last).iloc[0])} points at {reached(last['achieved_sparsity'].iloc[0])} reached"
        )
    asked = percent(table["target_sparsity"].max())
    points = signed(said["progressive_increase_at_90"])
    published = f"Paper: {points} points at 90 %, progressive. " if role == "base" else ""
    claims.append(f"{published}Ours, {asked} asked for: {'; '.join(ours)}.")
    return claims
