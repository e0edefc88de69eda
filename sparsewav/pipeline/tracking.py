"""Tracking: one sink that a run's results are handed to."""

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsewav.errors import UserError
from sparsewav.pipeline import run_folder
from sparsewav.settings.run import Tracker, Wandb

logger = logging.getLogger(__name__)

TRANSCRIPTS_SHOWN = 50

Track = Callable[[dict[str, Any], Path], None]
"""Called with a finished run's metrics and its folder."""


@dataclass(frozen=True)
class RunDescription:
    """What a tracker needs to know of a run besides its results.

    Attributes:
        name: The name of the run's folder, unique by the configuration; its last part is a hash.
        settings: The whole configuration, nested, because every axis of an ablation has to be in it.
        choices: The option chosen in every group.
        overrides: What the command line or the sweep gave to this run, e.g. ``sparsity.target=0.8``.
        group: The experiment or sweep that the run belongs to.
    """

    name: str
    settings: dict[str, Any]
    choices: dict[str, str]
    overrides: list[str]
    group: str | None


def make_tracker(config: Tracker, description: RunDescription) -> Track:
    """Give the sink that the configuration chose."""
    if not isinstance(config, Wandb):
        return lambda metrics, folder: None

    def track(metrics: dict[str, Any], folder: Path) -> None:
        _track_in_wandb(config, description, metrics, folder)

    return track


def _track_in_wandb(config: Wandb, description: RunDescription, metrics: dict[str, Any], folder: Path) -> None:
    import pandas
    import wandb

    own = [
        item for item in description.overrides if not re.match(r"(scale|tracker|output_root|device|experiment)\b", item)
    ]
    arguments: dict[str, Any] = {
        "project": config.project,
        "entity": config.entity,
        "group": config.group or description.group,
        "job_type": metrics["finetune_strategy"],
        "name": f"{metrics['model']} {' '.join(own)}".strip(),
        "id": description.name.rpartition("-")[2],
        "resume": "allow",
        "tags": sorted(f"{group}={option}"[:64] for group, option in _used_options(description, metrics).items()),
        "config": description.settings | {"pruned_model": metrics["model"]},
        "dir": str(folder),
        "settings": wandb.Settings(quiet=True),  # without a second, partial table of the results
    }
    if config.mode is not None:
        arguments["mode"] = config.mode
    try:
        try:
            run = wandb.init(**arguments)
        except wandb.Error as error:
            logger.warning("W&B cannot be reached (%s)", error)
            print(
                f"W&B cannot be reached ({error}); the run is kept offline, send it later: wandb sync {folder}/wandb/*"
            )
            run = wandb.init(**(arguments | {"mode": "offline"}))
        for axis, curves in (("finetune/update", "finetune/*"), ("stage/sparsity", "stage/*")):
            run.define_metric(axis)
            run.define_metric(curves, step_metric=axis)
        made = 0  # updates of the stages before: the curves go on over all stages
        for number, stage in enumerate(metrics["stages"]):
            for entry in _training_log(folder, stage["sparsity"]):
                run.log(
                    {"finetune/update": made + entry.pop("update")} | {f"finetune/{k}": v for k, v in entry.items()}
                )
            made += stage["updates"]
            run.log({"stage/number": number} | {f"stage/{key}": value for key, value in stage.items()})
        predictions = pandas.read_json(folder / run_folder.PREDICTIONS, lines=True, dtype=False)
        run.log(
            {
                **{f"eval/{key}": metrics[key] for key in run_folder.RATES},
                **{
                    f"eval/{record['name']}/{key}": record[key]
                    for record in metrics["evaluation"][1:]
                    for key in run_folder.RATES
                },
                "prune/sparsity_achieved": metrics["achieved_sparsity"],
                "prune/seconds": metrics["seconds"]["prune"],
                "prune/peak_memory": metrics["peak_memory_bytes"],
                "params/nonzero": metrics["params_nonzero"],
                "params/total": metrics["params_total"],
                **(
                    {"layers": wandb.Table(dataframe=pandas.read_csv(folder / run_folder.LAYERS))}
                    if (folder / run_folder.LAYERS).is_file()  # a baseline has none
                    else {}
                ),
                "stages": wandb.Table(dataframe=pandas.DataFrame(metrics["stages"])),
                "transcripts": wandb.Table(dataframe=predictions.head(TRANSCRIPTS_SHOWN)),
            }
        )
        run.summary.update(metrics)
        run.finish()
    except wandb.Error as error:
        raise UserError(f"tracker=wandb failed: {error}; the run's results are safe in {folder}") from error


def _used_options(description: RunDescription, metrics: dict[str, Any]) -> dict[str, str]:
    """Give the options that the run used: of its model the name that results have, whatever the group's option names.

    A baseline does not use the groups of our method, nor ALPS a saliency; the metrics have no name of them.
    """
    named = description.choices | {group: metrics[group] for group in description.choices if group in metrics}
    return {group: str(option) for group, option in named.items() if option not in (None, "None")}


def _training_log(folder: Path, sparsity: float) -> list[dict[str, float]]:
    """Give the entries of the trainer's log at one stage, without what is missing in them."""
    import pandas

    path = folder / run_folder.TRAINING_LOG
    if not path.is_file():
        return []
    log = pandas.read_csv(path)
    rows = log[log["stage"] == sparsity].drop(columns="stage").to_dict("records")
    return [{str(key): value for key, value in row.items() if pandas.notna(value)} for row in rows]
