"""Table 3: how long pruning takes."""

import pandas

from experiments.results import Item, Result, describe, paper
from experiments.sweeps import Scale, Sweep, read
from experiments.tables import mean_and_deviation, write_table
from sparsewav.errors import UserError

SWEEPS = (Sweep("timing", "base"), Sweep("timing", "large"))

OURS = {"wav2vec2-base": "base", "wav2vec2-large": "large"}


def make(scale: Scale) -> Result:
    """Write ``table3``.

    Raises:
        UserError: a run is missing, or took a piece from the cache.
    """
    runs = read(SWEEPS, scale)
    runs["prune"] = [seconds["prune"] for seconds in runs["seconds"]]
    if runs["cached"].map(len).any():
        raise UserError("a run of the timing sweep took a piece from the cache; run it again with force=true")
    rows = []
    for published in paper()["table3"]:
        row = {
            "Method": published["method"],
            "Paper model": published["model"],
            "Paper time": _duration(published["seconds"]),
        }
        if published["method"] == "SparseWAV":
            chosen = runs[runs["role"] == OURS[published["model"]]]
            seconds = pandas.DataFrame(list(chosen["seconds"]))
            row |= {
                "Our model": chosen["model"].iloc[0],
                "Our seconds to prune": mean_and_deviation(chosen["prune"], 1),
                **{f"of it {piece}": f"{seconds[piece].mean():.1f}" for piece in ("calibrate", "allocate", "solve")},
                "Runs": str(len(chosen)),
            }
        rows.append(row)
    frame = pandas.DataFrame(rows)
    means = runs.groupby("role")["prune"].mean()
    published = {row["model"]: row["seconds"] for row in paper()["table3"] if row["method"] == "SparseWAV"}
    notes = [
        describe(runs, scale),
        f"{runs['threads'].iloc[0]} threads; {runs['n_calibration_utterances'].iloc[0]} calibration utterances; whole "
        "stages of runs that took nothing from the cache, one after the other.",
        f"Large over base, of one sweep on one machine: {means['large'] / means['base']:.2f} "
        f"(paper: {published['wav2vec2-large'] / published['wav2vec2-base']:.2f}).",
        "Prior methods were not run here. Seconds on other hardware and models do not compare: no speedup is claimed.",
    ]
    title = "Table 3: time to prune"
    write_table(scale.folder, "table3", title, frame, notes)
    return Result(title, notes, frame, [scale.folder / f"table3.{suffix}" for suffix in ("csv", "md", "tex")])


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.0f} hours" if seconds >= 3600 else f"{seconds:.0f} seconds"


ITEM = Item(SWEEPS, make)
