"""Table 3: the duration of the compression, without the fine-tuning that follows it."""

import pandas

from experiments.paper import baselines
from experiments.results import Item, Result, describe, paper
from experiments.sweeps import Scale, Sweep, read
from experiments.tables import mean_and_deviation, write_table
from sparsewav.baselines import METHODS
from sparsewav.errors import UserError

OURS = (Sweep("paper/timing", "base"), Sweep("paper/timing", "large"))
LARGE = tuple(baselines.sweep_of(method, "large") for method in ("dphubert",) if method in METHODS)
SWEEPS = (*OURS, *(sweep for sweep in baselines.SWEEPS if sweep.role == "base"), *LARGE)

ROLES = {"HuBERT-base": "base", "HuBERT-large": "large", "wav2vec2-base": "base", "wav2vec2-large": "large"}
"""The role of our model that stands for each of the paper's models."""


def make(item: Item, scale: Scale) -> Result:
    """Write the table.

    Raises:
        UserError: A run is missing, or took a piece from the cache.
    """
    runs = read(item.sweeps, scale)
    runs["prune"] = [seconds["prune"] for seconds in runs["seconds"]]
    if runs["cached"].map(len).any():
        raise UserError("a run of the timing sweep took a piece from the cache; run it again with force=true")
    means = runs[runs["method"] == "sparsewav"].groupby("role")["prune"].mean()
    methods = {name: row.method for name, row in baselines.registered().items()}
    wanted = [(row["method"], row["model"], row["seconds"]) for row in paper()["table3"]]
    shown = {name for name, _, _ in wanted}
    rows_of_base = [row for row in baselines.registered().items() if row[1].role == "base" and row[0] not in shown]
    # Ours last among those of its size, as in the paper.
    first_ours = next(index for index, (name, _, _) in enumerate(wanted) if name == "SparseWAV")
    wanted[first_ours:first_ours] = [(name, "wav2vec2-base", None) for name, _ in rows_of_base]
    rows = []
    for name, model, seconds in wanted:
        row: dict[str, object] = {"Method": name}
        if seconds is not None:
            row |= {"Paper model": model, "Paper time": _duration(seconds)}
        method = "sparsewav" if name == "SparseWAV" else methods.get(name)
        chosen = runs[(runs["role"] == ROLES[model]) & (runs["method"] == method)]
        if len(chosen):
            row |= _measured(chosen, means[ROLES[model]])
        rows.append(row)
    frame = pandas.DataFrame(rows)
    published = {row["model"]: row["seconds"] for row in paper()["table3"] if row["method"] == "SparseWAV"}
    ours = runs[runs["method"] == "sparsewav"]
    slower = [
        name
        for name, model, seconds in wanted
        if name != "SparseWAV" and seconds and name in methods
        for prune in [runs[(runs["role"] == ROLES[model]) & (runs["method"] == methods[name])]["prune"].mean()]
        if prune <= means[ROLES[model]]
    ]
    notes = [
        describe(runs, scale),
        f"Threads: {runs['threads'].iloc[0]}; {ours['n_calibration_utterances'].iloc[0]} calibration utterances; whole "
        "stages of runs that took nothing from the cache, one after the other. Times as long: against ours on the same "
        "model, measured in these runs.",
        f"Large over base, of one sweep on one machine: {means['large'] / means['base']:.2f} "
        f"(paper: {published['wav2vec2-large'] / published['wav2vec2-base']:.2f}).",
        baselines.note(runs, scale) + " Unshortened, what trains takes that many times as long.",
        "Ours is the fastest of the paper's rows that were run: "
        + ("yes" if not slower else f"no, not faster than {', '.join(slower)}")
        + " (paper: yes). A dash: not run here.",
    ]
    return write_table(item, scale, frame, notes)


def _measured(chosen: pandas.DataFrame, ours: float) -> dict[str, str]:
    """The cells of one method's runs on one model."""
    compression = chosen["compression"].iloc[0]
    seconds = pandas.DataFrame(list(chosen["seconds"]))
    ratio = chosen["prune"].mean() / ours
    cells = {
        "Our model": chosen["model"].iloc[0],
        "Our seconds": mean_and_deviation(chosen["prune"], 1),
        "Times as long as ours": f"{ratio:.1f}" if ratio >= 1 else f"{ratio:.2f}",
        "Runs": str(len(chosen)),
    }
    if isinstance(compression, dict):
        updates, batch_size = compression["updates"], compression["batch_size"]
        return cells | {"Updates": f"{updates:,} x {batch_size}" if updates else "none"}
    return cells | {f"of it {piece}": f"{seconds[piece].mean():.1f}" for piece in ("calibrate", "allocate", "solve")}


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.0f} hours" if seconds >= 3600 else f"{seconds:.0f} seconds"
