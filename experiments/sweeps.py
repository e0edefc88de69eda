"""The sweeps behind the tables and figures: which runs they have, which are missing, and how they are launched."""

import hashlib
import json
import math
import shlex
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pandas
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

import sparsewav.cli.app  # noqa: F401  (registers the schemas and the run's name)
from sparsewav.errors import UserError
from sparsewav.files import conf_folder
from sparsewav.pipeline import run_folder

MODELS = {
    "demo": {
        "base": "demo",
        "large": "demo-large-960h",  # the best of the three: at 2 cores' scale the others are far from converged
        "large_10m": "demo-large-10m",
        "large_100h": "demo-large-100h",
        "large_960h": "demo-large-960h",
        "wavlm": "demo-wavlm",
        "hubert": "demo-hubert",
    },
    "paper": {
        "base": "wav2vec2-base-100h",
        "large": "wav2vec2-large-100h",
        "large_10m": "wav2vec2-large-10m",
        "large_100h": "wav2vec2-large-100h",
        "large_960h": "wav2vec2-large-960h",
        "wavlm": "wavlm-base-plus-100h",
        "hubert": "hubert-base-100h",
    },
}
"""The option of the group ``model`` that stands for each of the paper's models, at each scale."""


@dataclass(frozen=True)
class Scale:
    """Where and on what the sweeps run.

    Attributes:
        name: ``demo`` or ``paper``.
        folder: The folder of runs, tables and figures.
        overrides: Settings added to every run, e.g. another corpus.
    """

    name: str
    folder: Path
    overrides: tuple[str, ...] = ()

    @property
    def usual(self) -> bool:
        """Whether the folder is the one without ``--output``."""
        return self.folder == Path("outputs") / self.name


@dataclass(frozen=True)
class Sweep:
    """One launch of ``sparsewav``.

    Attributes:
        experiment: The file of ``conf/experiment`` with the grid.
        role: Which of the paper's models is pruned, a key of :data:`MODELS`.
        demo, paper: Settings at this scale alone.
        both: Settings at either scale.
        preset: A preset of ``conf/experiment`` that the grid is run with.
        seconds: Duration of a one-shot run at demo scale, for the estimate; None where it is that of the paper's
            method.
    """

    experiment: str
    role: str
    demo: tuple[str, ...] = ()
    both: tuple[str, ...] = ()
    preset: str | None = None
    seconds: float | None = None
    paper: tuple[str, ...] = ()

    def settings(self, scale: Scale) -> list[str]:
        """Arguments of the command ``sparsewav`` but for the folder."""
        experiment = f"[{self.preset},{self.experiment}]" if self.preset else self.experiment
        model = MODELS[scale.name][self.role]
        own = (*self.both, *(self.demo if scale.name == "demo" else self.paper))
        return [f"experiment={experiment}", f"scale={scale.name}", f"model={model}", *own, *scale.overrides]

    def arguments(self, scale: Scale) -> list[str]:
        """Arguments of the command ``sparsewav``."""
        root = [] if scale.usual else [f"output_root={scale.folder}"]
        return [*self.settings(scale), *root]

    def command(self, scale: Scale) -> str:
        """The command, to be typed."""
        return shlex.join(["sparsewav", *self.arguments(scale)])


@dataclass(frozen=True)
class Job:
    """One run of a sweep.

    Attributes:
        folder: The folder of the run.
        settings: Its point of the grid.
        config: The composed configuration.
    """

    folder: Path
    settings: dict[str, str]
    config: DictConfig

    @property
    def done(self) -> bool:
        return (self.folder / run_folder.METRICS).is_file()


@cache
def jobs(sweep: Sweep, scale: Scale) -> list[Job]:
    """Every run of a sweep, in the order of its grid."""
    settings = tuple(sweep.settings(scale))
    grid = _composed(settings).hydra.sweeper.params
    values = {key: [item.strip() for item in str(text).split(",")] for key, text in grid.items()}
    # Only the choice of a group needs Hydra again; a plain value is set in what it composed.
    groups = [key for key in values if "." not in key and (conf_folder() / key).is_dir()]
    found = []
    for words in product(*values.values()):
        point = dict(zip(values, words, strict=True))
        config = _composed((*settings, *(f"{key}={point[key]}" for key in groups))).copy()
        config.output_root = str(scale.folder)
        for key in values.keys() - set(groups):
            OmegaConf.update(config, key, json.loads(point[key]))
        found.append(Job(Path(config.hydra.sweep.dir) / config.hydra.sweep.subdir, point, config))
    return found


@cache
def _composed(arguments: tuple[str, ...]) -> DictConfig:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        return compose("config", overrides=list(arguments), return_hydra_config=True)


def launch(sweep: Sweep, scale: Scale, extra: Iterable[str] = ()) -> int:
    """Run what is missing of a sweep, in a process of its own that shows its progress.

    Args:
        sweep: What to run.
        scale: Where to run it.
        extra: Further arguments that do not change the results, e.g. a launcher.

    Returns:
        How many of its runs are still missing.
    """
    subprocess.run([sys.executable, "-m", "sparsewav", *sweep.arguments(scale), *extra], check=False)
    return sum(not job.done for job in jobs(sweep, scale))


NUMBERS = ("wer", "wer_dense", "achieved_sparsity")
"""Keys of ``metrics.json`` that every table reads, and that have to be numbers."""

CHOICES = (
    "method",
    "saliency",
    "solver",
    "objective",
    "recovery",
    "quantization",
    "allocation",
    "finetune_strategy",
)
"""Groups of whose options ``metrics.json`` has the names; what a baseline does not use is null there."""

TARGETS = {"target": "target_sparsity"} | {key: f"target_{key}" for key in ("megabytes", "parameters", "macs")}
TARGETS |= {"speedup": "asked_speedup"}
"""Options of the group ``sparsity``, and what they are in ``metrics.json``."""


def read(sweeps: Iterable[Sweep], scale: Scale) -> pandas.DataFrame:
    """Read the finished runs of sweeps into a table, a row a run.

    Its columns are the metrics, and ``experiment``, ``role``, ``run`` (the folder), ``batch_size`` of the fine-tuning.

    Raises:
        UserError: A run is missing, damaged or another one than the sweep's (the message has the command that makes
            it), or two runs differ in the evaluation set or in the dense model.
    """
    sweeps = list(sweeps)
    check_roles(sweeps, scale)
    rows: list[dict[str, Any]] = []
    for sweep in sweeps:
        missing = [job for job in jobs(sweep, scale) if not job.done]
        if missing:
            error = missing[0].folder / run_folder.ERROR
            reason = f" ({json.loads(error.read_text())['error']})" if error.is_file() else ""
            raise UserError(
                f"{len(missing)} of {len(jobs(sweep, scale))} runs are missing, the first of them "
                f"{missing[0].folder}{reason}; make them: {sweep.command(scale)}"
            )
        for job in jobs(sweep, scale):
            metrics = read_run(job.folder)
            asked = {"seed": job.config.seed}
            asked |= {key: job.config.sparsity[own] for own, key in TARGETS.items() if own in job.config.sparsity}
            asked |= {group: job.config[group].name for group in CHOICES if metrics[group] is not None}
            foreign = [
                f"{key}={metrics.get(key)} instead of {value}"
                for key, value in asked.items()
                if metrics.get(key) != value
            ]
            if foreign:
                raise UserError(
                    f"{job.folder / run_folder.METRICS} is of another run ({', '.join(foreign)}); delete it, and "
                    f"make it again: {sweep.command(scale)}"
                )
            own = {"experiment": sweep.experiment, "role": sweep.role, "batch_size": job.config.training.batch_size}
            rows.append(own | metrics)
    runs = pandas.DataFrame(rows)
    check_comparable(runs, DATA_KEYS)
    for _, same in runs.groupby("role"):
        check_comparable(same, MODEL_KEYS)
    return runs


def check_roles(sweeps: Iterable[Sweep], scale: Scale) -> None:
    """Refuse to compare a model with itself under two names, as with a setting that names one model for all runs.

    Raises:
        UserError: One model stands for two of the paper's.
    """
    roles: dict[str, str] = {}
    for sweep in sweeps:
        model = model_source(jobs(sweep, scale)[0].config)
        if roles.setdefault(model, sweep.role) != sweep.role:
            raise UserError(
                f"this compares several models, and {model} would stand for {roles[model]} and for {sweep.role}; leave "
                "out the setting that names one model for all runs"
            )


def model_source(config: DictConfig) -> str:
    """What the model of a run is loaded from."""
    return str(config.model.fairseq_checkpoint or config.model.name_or_path)


def read_run(folder: Path) -> dict[str, Any]:
    """Read the metrics of a finished run; adds ``run``, its folder, and what it read.

    ``evaluation_set`` is a hash of the utterances, ``model_files`` are the hashes of the dense model's files.

    Raises:
        UserError: A file of the run is damaged, or lacks a key, or a figure is no finite number.
    """
    path = folder / run_folder.METRICS
    again = "delete it, and launch the run again"
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
        absent = {*NUMBERS, *CHOICES, "model", "seed", "target_sparsity", "n_utterances", "updates"} - metrics.keys()
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}); {again}") from None
    if absent:
        raise UserError(f"{path} has no {', '.join(sorted(absent))}: it is not of this version of sparsewav; {again}")
    for key in NUMBERS:
        figure = metrics[key]
        if isinstance(figure, bool) or not isinstance(figure, int | float) or not math.isfinite(figure):
            raise UserError(f"{path}: {key} is {figure}, which is not a finite number; {again}")
    rows = read_predictions(folder)
    if len(rows) != metrics["n_utterances"]:
        raise UserError(
            f"{folder / run_folder.PREDICTIONS} has {len(rows)} utterances and {path.name} says "
            f"{metrics['n_utterances']}; delete both, and launch the run again"
        )
    texts = json.dumps([[row["id"], row["reference"]] for row in rows])
    evaluation_set = hashlib.blake2b(texts.encode(), digest_size=16).hexdigest()
    content = (metrics.get("inputs") or {}).get("content", {})
    model_files = json.dumps({name: content[name] for name in sorted(content) if name.startswith("model/")})
    return metrics | {"run": str(folder), "evaluation_set": evaluation_set, "model_files": model_files}


def read_predictions(folder: Path) -> list[dict[str, str]]:
    """Read id, reference and hypotheses of every utterance of the first evaluation set, in its order.

    Raises:
        UserError: The file is missing or damaged.
    """
    path = folder / run_folder.PREDICTIONS
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").rstrip("\n").split("\n")]
        if all(isinstance(row[key], str) for row in rows for key in ("set", "id", "reference", "after")):
            return [row for row in rows if row["set"] == rows[0]["set"]]
    except (OSError, ValueError, TypeError, KeyError):
        pass
    raise UserError(f"{path} is missing or damaged; delete {run_folder.METRICS} beside it, and launch the run again")


MODEL_KEYS = {
    "model": "the model",
    "model_files": "the content of the model's files",
    "wer_dense": "the dense model's WER",
}
DATA_KEYS = {
    "n_utterances": "the number of evaluated utterances",
    "evaluation_set": "the evaluated utterances or their transcripts",
}
"""Columns in which runs that are compared agree, those of one model in the first ones too, and what they are."""


def check_comparable(runs: pandas.DataFrame, keys: dict[str, str]) -> None:
    """Refuse runs that were evaluated on different utterances, or that come from different dense models.

    Raises:
        UserError: Two runs differ; the message names both.
    """
    for key, what in keys.items():
        for _, other in runs[runs[key] != runs[key].iloc[0]].iloc[:1].iterrows():
            shown = "" if key in ("evaluation_set", "model_files") else f" ({runs[key].iloc[0]} and {other[key]})"
            raise UserError(
                f"two runs differ in {what}{shown} and are not compared: {runs['run'].iloc[0]} and {other['run']}; "
                "make those of them again that are out of date (force=true), or keep them in another folder"
            )
