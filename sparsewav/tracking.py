"""Tracking: one sink that a run's results are handed to."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparsewav.config import TrackerConfig, WandbTracker
from sparsewav.errors import UserError

logger = logging.getLogger(__name__)

TRANSCRIPTS_SHOWN = 50

Tracker = Callable[[dict[str, Any], Path], None]
"""Called with a finished run's metrics and its folder."""


def make_tracker(config: TrackerConfig, settings: dict[str, Any], name: str, sweep: str | None) -> Tracker:
    """Give the sink that the configuration chose.

    Args:
        config: which one.
        settings: the run's whole configuration: every axis of an ablation has to be in it.
        name: readable name of the run, unique by its configuration.
        sweep: name of the sweep that the run belongs to.
    """
    if not isinstance(config, WandbTracker):
        return lambda metrics, folder: None

    def track(metrics: dict[str, Any], folder: Path) -> None:
        _track_in_wandb(config, settings, name, sweep, metrics, folder)

    return track


def _track_in_wandb(
    config: WandbTracker,
    settings: dict[str, Any],
    name: str,
    sweep: str | None,
    metrics: dict[str, Any],
    folder: Path,
) -> None:
    import pandas
    import wandb

    arguments: dict[str, Any] = {
        "project": config.project,
        "entity": config.entity,
        "group": config.group or sweep,
        "job_type": metrics["method"],
        "name": name,
        "id": name.rpartition("-")[2],
        "resume": "allow",
        "config": settings,
        "dir": str(folder),
    }
    if config.mode is not None:
        arguments["mode"] = config.mode
    try:
        try:
            run = wandb.init(**arguments)
        except wandb.Error as error:
            logger.warning("W&B cannot be reached (%s); the run is kept offline, send it with: wandb sync", error)
            run = wandb.init(**(arguments | {"mode": "offline"}))
        layers = pandas.read_csv(folder / "layers.csv")
        predictions = pandas.read_json(folder / "predictions.jsonl", lines=True, dtype=False)
        run.log(
            {
                "eval/wer": metrics["wer"],
                "eval/wer_dense": metrics["wer_dense"],
                "eval/wer_pruned": metrics["wer_pruned"],
                "prune/sparsity_achieved": metrics["achieved_sparsity"],
                "prune/seconds": metrics["seconds"]["prune"],
                "prune/peak_memory": metrics["peak_memory_bytes"],
                "params/nonzero": metrics["params_nonzero"],
                "params/total": metrics["params_total"],
                "layers": wandb.Table(dataframe=layers),
                "transcripts": wandb.Table(dataframe=predictions.head(TRANSCRIPTS_SHOWN)),
            }
        )
        run.finish()
    except wandb.Error as error:
        raise UserError(f"tracker=wandb failed: {error}; the run's results are safe in {folder}") from error
