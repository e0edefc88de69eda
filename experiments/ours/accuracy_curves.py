"""The accuracy curves: WER over sparsity of the paper's method and the presets, one-shot and tuned."""

import pandas

from experiments.ours.variants import VARIANTS
from experiments.paper.curves import points_of
from experiments.plots import Curve, plot_curves
from experiments.results import Item, Result, describe
from experiments.sweeps import Scale, read
from sparsewav.files import write_file

SHOWN = tuple(variant for variant in VARIANTS if variant.curve)
SWEEPS = tuple(sweep for variant in SHOWN for sweep in (variant.one_shot, variant.tuned))


def make(item: Item, scale: Scale) -> Result:
    """Draw the figure."""
    runs = read(item.sweeps, scale)
    curves = []
    for color, variant in enumerate(SHOWN):
        for sweep, kind in ((variant.one_shot, "one-shot"), (variant.tuned, "tuned")):
            own = read([sweep], scale)
            dense = own["wer_dense"].iloc[0]
            curves.append(Curve(f"{variant.curve}, {kind}", points_of(own), dense, color, kind == "tuned"))
    plot_curves(scale.folder / item.name, f"{runs['model'].iloc[0]}, at the same sparsity", curves)
    png, pdf, csv = item.files(scale, "png", "pdf", "csv")
    with write_file(csv) as path:
        points = [curve.points.assign(curve=curve.label) for curve in curves]
        pandas.concat(points)[["curve", "sparsity", "wer"]].to_csv(path, index=False)
    tuned = runs[runs["updates"] > 0]
    notes = [
        describe(runs, scale),
        "Bands: one standard deviation over the seeds. All curves reach the same sparsity, to one weight.",
        f"Tuned: one pass, {tuned['updates'].min():,} to {tuned['updates'].max():,} updates, one seed.",
    ]
    return Result(notes, [png, pdf, csv])
