"""Table 3: the duration of the compression, without the fine-tuning that follows it."""

from typing import Any

import pandas

from experiments.paper import baselines, table2
from experiments.results import Item, Result, describe, paper, reached, summarize
from experiments.sweeps import Scale, Sweep
from experiments.tables import mean_and_deviation, write_table
from sparsewav.baselines import METHODS
from sparsewav.errors import UserError

OURS = (Sweep("paper/timing", "base"), Sweep("paper/timing", "large"))
LARGE = tuple(baselines.sweep_of(method, "large") for method in ("dphubert",) if method in METHODS)
SWEEPS = (*OURS, table2.STRUCTURED, *(sweep for sweep in baselines.SWEEPS if sweep.role == "base"), *LARGE)

ROLES = {"HuBERT-base": "base", "HuBERT-large": "large", "wav2vec2-base": "base", "wav2vec2-large": "large"}
"""The role of our model that stands for each of the paper's models."""


SHOWN_IN_PAPER = ("Method", "Our model", "Paper time", "Our seconds", "Times ours", "Updates")


def make(item: Item, scale: Scale) -> Result:
    """Write the table.

    Raises:
        UserError: A run is missing, or took a piece from the cache.
    """
    runs = baselines.read_methods(item.sweeps, scale)
    runs["prune"] = [seconds["prune"] for seconds in runs["seconds"]]
    cached = runs[runs["seconds_cached"].map(lambda pieces: bool(pieces.keys() - {"evaluate"}))]
    if len(cached):
        raise UserError(f"{cached['run'].iloc[0]} took a piece from the cache; run its sweep again with force=true")
    if runs["threads"].nunique() > 1 or runs["device"].nunique() > 1:
        raise UserError(
            "the runs were timed on different devices or with different numbers of threads ("
            + ", ".join(sorted({f"{run.device}, {run.threads} threads" for run in runs.itertuples()}))
            + "); run them again on one machine (force=true)"
        )
    means = runs[runs["method"] == "sparsewav"].groupby("role")["prune"].mean()
    methods = {name: row.method for name, row in baselines.registered().items()}
    methods |= {"SparseWAV": "sparsewav", "SparseWAV, structured": baselines.STRUCTURED}
    wanted = [(row["method"], row["model"], row["seconds"]) for row in paper()["table3"]]
    shown = {name for name, _, _ in wanted}
    rows_of_base = [row for row in baselines.registered().items() if row[1].role == "base" and row[0] not in shown]
    # Ours last among those of its size, as in the paper.
    first_ours = next(index for index, (name, _, _) in enumerate(wanted) if name == "SparseWAV")
    wanted[first_ours:first_ours] = [(name, "wav2vec2-base", None) for name, _ in rows_of_base]
    wanted.insert(first_ours + len(rows_of_base) + 1, ("SparseWAV, structured", "wav2vec2-base", None))
    rows: list[dict[str, object]] = []
    values: list[dict[str, object]] = []
    for name, model, seconds in wanted:
        row: dict[str, object] = {"Method": name}
        value: dict[str, object] = {"method": name}
        if seconds is not None:
            row |= {"Paper model": model, "Paper time": _duration(seconds)}
            value |= {"paper_model": model, "paper_seconds": seconds}
        chosen = runs[(runs["role"] == ROLES[model]) & (runs["method"] == methods.get(name))]
        if len(chosen):
            value |= _measured(chosen, means[ROLES[model]], scale)
            row |= _printed(chosen, value)
        rows.append(row)
        values.append(value)
    frame = pandas.DataFrame(rows)
    published = {row["model"]: row["seconds"] for row in paper()["table3"] if row["method"] == "SparseWAV"}
    ours = runs[runs["method"].isin(baselines.OURS)]
    slower = [
        name
        for name, model, seconds in wanted
        if name != "SparseWAV" and seconds and name in methods
        for prune in [runs[(runs["role"] == ROLES[model]) & (runs["method"] == methods[name])]["prune"].mean()]
        if prune <= means[ROLES[model]]
    ]
    calibration = ", ".join(map(str, sorted(set(ours["n_calibration_utterances"]))))
    notes = [
        *describe(runs, scale),
        f"Threads: {runs['threads'].iloc[0]}; {calibration} calibration utterances; whole stages of runs that took "
        "nothing from the cache. Seconds: mean, with ± and standard deviation over the runs where there are several, "
        "without the fine-tuning. Times ours: as long as ours on the same model, measured in these runs.",
        "Reached: the sparsity of the transformer's matrices, which is not the same for all methods.",
        f"Large over base: {means['large'] / means['base']:.2f} "
        f"(paper: {published['wav2vec2-large'] / published['wav2vec2-base']:.2f}).",
        baselines.note(runs) + " Unshortened, what trains takes that many times as long.",
        "Ours is the fastest of the paper's rows that were run: "
        + ("yes" if not slower else f"no, not faster than {', '.join(slower)}")
        + " (paper: yes). A dash: not run here.",
    ]
    return write_table(item, scale, frame, notes, pandas.DataFrame(values), SHOWN_IN_PAPER)


def _measured(chosen: pandas.DataFrame, ours: float, scale: Scale) -> dict[str, object]:
    """The CSV's columns of one method's runs on one model."""
    compression = chosen["compression"].iloc[0]
    trained = isinstance(compression, dict)
    seconds = pandas.DataFrame(list(chosen["seconds"]))
    pieces = [] if trained else ["calibrate", "allocate", "solve"]
    return {
        "model": chosen["model"].iloc[0],
        "seconds_mean": chosen["prune"].mean(),
        "seconds_deviation": chosen["prune"].std(),
        "times_as_long": chosen["prune"].mean() / ours,
        "compression_updates": compression["updates"] if trained else None,
        "compression_batch_size": compression["batch_size"] if trained else None,
        **{f"seconds_{piece}": seconds[piece].mean() for piece in pieces},
        **summarize(chosen, scale.folder),
    }


def _printed(chosen: pandas.DataFrame, value: dict[str, Any]) -> dict[str, object]:
    """The cells of one method's runs on one model."""
    updates, ratio = value["compression_updates"], value["times_as_long"]
    pieces = [piece for piece in ("calibrate", "allocate", "solve") if f"seconds_{piece}" in value]
    return {
        "Our model": value["model"],
        "Our seconds": mean_and_deviation(chosen["prune"], 1),
        "Times ours": f"{ratio:.1f}" if ratio >= 1 else f"{ratio:.2f}",
        "Seeds": str(value["seeds"]),
        "Reached": reached(value["achieved_sparsity"]),
        "Updates": f"{updates:,} x {value['compression_batch_size']}" if updates else "none",
    } | {f"of it {piece}": f"{value[f'seconds_{piece}']:.1f}" for piece in pieces}


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.0f} hours" if seconds >= 3600 else f"{seconds:.0f} seconds"
