"""The sweeps behind the tables and figures: which runs they have, which are missing, and how they are launched."""

import json
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


@dataclass(frozen=True)
class Sweep:
    """One launch of ``sparsewav``.

    Attributes:
        experiment: The file of ``conf/experiment`` with the grid.
        role: Which of the paper's models is pruned, a key of :data:`MODELS`.
        demo: Settings at demo scale alone.
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

    def settings(self, scale: Scale) -> list[str]:
        """Arguments of the command ``sparsewav`` but for the folder."""
        experiment = f"[{self.preset},{self.experiment}]" if self.preset else self.experiment
        model = MODELS[scale.name][self.role]
        own = (*self.both, *(self.demo if scale.name == "demo" else ()))
        return [f"experiment={experiment}", f"scale={scale.name}", f"model={model}", *own, *scale.overrides]

    def arguments(self, scale: Scale) -> list[str]:
        """Arguments of the command ``sparsewav``."""
        root = [] if scale.folder == Path("outputs") / scale.name else [f"output_root={scale.folder}"]
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


def read(sweeps: Iterable[Sweep], scale: Scale) -> pandas.DataFrame:
    """Read the finished runs of sweeps into a table, a row a run: its metrics, and ``experiment`` and ``role``.

    Raises:
        UserError: A run is missing; the message has the command that makes it.
    """
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
            metrics = json.loads((job.folder / run_folder.METRICS).read_text())
            rows.append({"experiment": sweep.experiment, "role": sweep.role} | metrics)
    return pandas.DataFrame(rows)
