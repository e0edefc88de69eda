"""Tracking: a run is told to Weights & Biases while it is made."""

import logging
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread
from types import TracebackType
from typing import Any, Self

import pandas

from sparsewav.errors import UserError
from sparsewav.files import Held
from sparsewav.pipeline import run_folder
from sparsewav.settings.run import Tracker, Wandb

logger = logging.getLogger(__name__)

TRANSCRIPTS_SHOWN = 50

RESULTS = (*run_folder.RATES, "divergence")
"""The figures of an evaluation set; an encoder without a head has the divergence alone."""

INTERVAL = 10.0
"""Seconds between two looks at the training log, whose new entries are sent."""

INTERRUPTED = 130
"""The exit code of a run that the user has stopped, as shells have it."""


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


@dataclass
class Tracking:
    """A run at Weights & Biases, from the start of the work to its end; with another tracker it does nothing.

    A context manager: an error that leaves the block makes the run there a failed one. A run that is done already is
    not touched, unless :meth:`start` is called because it is done again, or it was never tracked.

    Attributes:
        config: Which tracker, and where.
        description: What is known of the run before it begins.
        folder: The run's folder; the training log that appears there is followed.
    """

    config: Tracker
    description: RunDescription
    folder: Path
    _run: Any = None
    _began: float = 0.0
    _sent: int = 0
    _ended: Event = field(default_factory=Event)
    _follower: Thread | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._stop_following()
        if error is None or isinstance(error, Held):  # a run that another launcher does is told by that one
            return
        self.start()  # a run that failed before it started is seen, too
        if self._run is None:
            return
        try:
            self._run.summary.update({"error": str(error) or type(error).__name__})
            self._run.finish(exit_code=INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1)
        except Exception as failure:  # the run's own error is what the user has to see
            logger.warning("W&B: %s", failure)

    def start(self) -> None:
        """Begin the run there, or go on with one that was interrupted; where W&B fails the work goes on without it."""
        if self._run is not None or not isinstance(self.config, Wandb) or list(self.config.faults()):
            return
        try:
            self._begin(self.config, self.config.mode)
        except Exception as error:
            self._lose(error)
            return
        self._began = time.time()
        self._follower = Thread(target=self._follow, daemon=True)
        self._follower.start()

    def finish(self, metrics: dict[str, Any]) -> None:
        """Tell the results of a finished run.

        Raises:
            UserError: W&B fails, even without a network; the results are in the run's folder.
        """
        self._stop_following()
        if not isinstance(self.config, Wandb):
            return
        if self._run is None and self._began == 0 and (self.folder / "wandb").is_dir():
            print(f"Tracked before: {self.folder / 'wandb'}")
            return
        try:
            if self._run is None:
                self._begin(self.config, self.config.mode if self._began == 0 else "offline")
            self._send_curves()
            self._send_results(metrics)
            self._run.finish()
        except Exception as error:
            raise UserError(f"tracker=wandb failed: {error}; the run's results are safe in {self.folder}") from error

    def _begin(self, config: Wandb, mode: str | None) -> None:
        import wandb

        settings = self.description.settings
        model = settings["model"]["fairseq_checkpoint"] or settings["model"]["name_or_path"]
        name = Path(model).stem if settings["model"]["fairseq_checkpoint"] else Path(model).name
        words = [
            item.lstrip("+")
            for item in self.description.overrides
            if not re.match(r"(scale|tracker|output_root|device|experiment)\b", item)
        ]
        arguments: dict[str, Any] = {
            "project": config.project,
            "entity": config.entity,
            "group": config.group or self.description.group,
            "job_type": settings["finetune_strategy"]["name"],
            "name": f"{name} {' '.join(words)}".strip(),
            "id": self.description.name.rpartition("-")[2],
            # An interrupted run goes on there, too; one that is done again takes the place of the one before.
            "resume": "allow" if (self.folder / run_folder.STAGES).is_dir() else None,
            "tags": _tags(self.description, {"model": name}),
            "config": settings | {"pruned_model": name, "options": self.description.choices},
            "dir": str(self.folder),
            # A banner before and a table of results after every run would drown what the run itself says.
            "settings": wandb.Settings(silent=True, console="off"),
        } | ({} if mode is None else {"mode": mode})
        self.folder.mkdir(parents=True, exist_ok=True)
        later = f"send it later: wandb sync {self.folder}/wandb/*"
        try:
            self._run = wandb.init(**arguments)
        except wandb.Error as error:
            logger.warning("W&B cannot be reached (%s)", error)
            print(f"W&B cannot be reached ({error}); the run is kept offline, {later}")
            self._run = wandb.init(**(arguments | {"mode": "offline"}))
        else:
            if not self._run.disabled:
                print(f"W&B: offline; {later}" if self._run.offline else f"W&B: {self._run.url}")
        self._sent = 0
        for axis, curves in (("finetune/update", "finetune/*"), ("stage/sparsity", "stage/*")):
            self._run.define_metric(axis)
            self._run.define_metric(curves, step_metric=axis)

    def _follow(self) -> None:
        """Send what the training log gets while the run is made, by whichever process trains."""
        path = self.folder / run_folder.TRAINING_LOG
        while not self._ended.wait(INTERVAL):
            try:
                if path.is_file() and path.stat().st_mtime >= self._began:  # and not the log of a run before
                    self._send_curves()
            except Exception as error:
                self._lose(error)
                return

    def _stop_following(self) -> None:
        self._ended.set()
        if self._follower is not None:
            self._follower.join()

    def _lose(self, error: Exception) -> None:
        """Go on without W&B after a failure; the results are told at the end, from the files of the run."""
        self._run, self._began = None, self._began or time.time()
        logger.warning("W&B failed (%s)", error)
        print(f"W&B failed ({error}); the run goes on, and its results will be kept offline in {self.folder}/wandb")

    def _send_curves(self) -> None:
        """Send the entries of the training log that were not sent; W&B drops those that an interrupted launch sent."""
        path = self.folder / run_folder.TRAINING_LOG
        if not path.is_file():
            return
        log = pandas.read_csv(path)
        last = log.groupby("stage", sort=False)["update"].max()
        before = last.cumsum() - last  # updates of the stages before: the curves go on over all stages
        for number, (stage, entry) in enumerate(log.set_index("stage").iterrows(), 1):
            if number > self._sent:
                values = {f"finetune/{key}": value for key, value in entry.dropna().items()}
                values["finetune/update"] = int(entry["update"] + before[stage])
                self._run.log(values, step=number, commit=True)
        self._sent = max(self._sent, len(log))

    def _send_results(self, metrics: dict[str, Any]) -> None:
        import wandb

        for number, stage in enumerate(metrics["stages"]):
            self._run.log({"stage/number": number} | {f"stage/{key}": value for key, value in stage.items()})
        figures = {
            **{f"eval/{key}": metrics[key] for key in RESULTS if metrics.get(key) is not None},
            **{
                f"eval/{record['name']}/{key}": record[key]
                for record in metrics["evaluation"][1:]
                for key in RESULTS
                if record.get(key) is not None
            },
            "prune/sparsity_achieved": metrics["achieved_sparsity"],
            **({} if metrics["achieved_share"] is None else {"prune/share_achieved": metrics["achieved_share"]}),
            "prune/seconds": metrics["seconds"]["prune"],
            "prune/peak_memory": metrics["peak_memory_bytes"],
            "params/nonzero": metrics["params_nonzero"],
            "params/total": metrics["params_total"],
            "stages": wandb.Table(dataframe=pandas.DataFrame(metrics["stages"])),
        }
        if (self.folder / run_folder.PREDICTIONS).is_file():
            predictions = pandas.read_json(self.folder / run_folder.PREDICTIONS, lines=True, dtype=False)
            table = "transcripts" if "reference" in predictions else "divergences"  # of an encoder, which writes none
            figures[table] = wandb.Table(dataframe=predictions.head(TRANSCRIPTS_SHOWN))
        if (self.folder / run_folder.LAYERS).is_file():  # a baseline has none
            figures["layers"] = wandb.Table(dataframe=pandas.read_csv(self.folder / run_folder.LAYERS))
        self._run.log(figures)
        self._run.summary.update(metrics)
        self._run.config.update({"pruned_model": metrics["model"]}, allow_val_change=True)
        self._run.tags = _tags(self.description, metrics)


def _tags(description: RunDescription, metrics: dict[str, Any]) -> tuple[str, ...]:
    """Name the options of a run; W&B takes at most 64 characters."""
    return tuple(sorted(f"{group}={option}"[:64] for group, option in _used_options(description, metrics).items()))


def _used_options(description: RunDescription, metrics: dict[str, Any]) -> dict[str, str]:
    """Give the options that the run used: of its model the name that results have, whatever the group's option names.

    A baseline does not use the groups of our method, nor ALPS a saliency; the metrics have no name of them.
    """
    named = description.choices | {group: metrics[group] for group in description.choices if group in metrics}
    return {group: str(option) for group, option in named.items() if option not in (None, "None")}
