"""The accuracy curves: WER over sparsity of the paper's method and the presets, one-shot and tuned."""

import pandas

from experiments.ours.variants import VARIANTS
from experiments.paper.curves import point_notes, write_points
from experiments.plots import Curve, plot_curves
from experiments.results import EQUAL, Item, Result, describe
from experiments.sweeps import DATA_KEYS, MODEL_KEYS, Scale, check_comparable, read

SHOWN = tuple(variant for variant in VARIANTS if variant.curve)
SWEEPS = tuple(sweep for variant in SHOWN for sweep in (variant.one_shot, variant.tuned))


def make(item: Item, scale: Scale) -> Result:
    """Draw the figure."""
    gathered = []
    curves = []
    for color, variant in enumerate(SHOWN):
        for sweep, kind in ((variant.one_shot, "one-shot"), (variant.tuned, "tuned")):
            own = read([sweep], scale).assign(curve=f"{variant.curve}, {kind}")
            gathered.append(own)
            curves.append(Curve(f"{variant.curve}, {kind}", own, own["wer_dense"].iloc[0], color, kind == "tuned"))
    runs = pandas.concat(gathered, ignore_index=True)
    check_comparable(runs, MODEL_KEYS | DATA_KEYS)
    plot_curves(scale.folder / item.name, runs["model"].iloc[0], curves)
    table = write_points(item, scale, runs, curve="curve")
    asked = table.groupby("target_sparsity")["achieved_sparsity"]
    apart = (asked.max() - asked.min()).max()
    equal = "the same sparsity" if apart < EQUAL else f"sparsities up to {100 * apart:.1f} points apart"
    notes = [*describe(runs, scale), *point_notes(table), f"At one asked sparsity the curves reach {equal}."]
    return Result(notes, item.files(scale, "png", "pdf", "csv"))
