"""What a table or figure is, before and after it is drawn."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas
import yaml

from experiments.sweeps import Scale, Sweep


@dataclass(frozen=True)
class Result:
    """A finished table or figure.

    Attributes:
        notes: Sentences to print below it.
        files: The files that were written, with the PNG of a figure first.
        table: The printed cells of a table, or of the table beside a figure.
    """

    notes: list[str]
    files: list[Path]
    table: pandas.DataFrame | None = None


@dataclass(frozen=True)
class Item:
    """A table or figure that ``./reproduce.sh`` makes.

    Attributes:
        name: Its name on the command line and the stem of its files.
        title: Its caption.
        sweeps: The sweeps whose runs it reads.
        make: Reads these runs, writes the item's files and returns what it made. It raises UserError if a run is
            missing.
        measure: Measures the models of the runs once all are finished. Most items need no such step.
        hours: Whether its runs take hours at demo scale, so that ``full`` includes it and ``all`` does not.
    """

    name: str
    title: str
    sweeps: tuple[Sweep, ...]
    make: Callable[["Item", Scale], Result]
    measure: Callable[["Item", Scale], None] | None = None
    hours: bool = False

    @property
    def short(self) -> str:
        """The beginning of the title, for links: ``Table 1``."""
        return self.title.partition(":")[0]

    def files(self, scale: Scale, *suffixes: str) -> list[Path]:
        """Paths of the item's files with these suffixes."""
        return [scale.folder / f"{self.name}.{suffix}" for suffix in suffixes]


def paper() -> dict[str, Any]:
    """The figures that the paper reports, as ``paper.yaml`` has them."""
    return yaml.safe_load((Path(__file__).parent / "paper.yaml").read_text(encoding="utf-8"))


def describe(runs: pandas.DataFrame, scale: Scale) -> str:
    """One sentence on the models, data and devices of some runs."""
    devices = ", ".join(sorted(set(runs["device"])))
    models = ", ".join(dict.fromkeys(runs["model"]))
    seeds = ", ".join(str(seed) for seed in sorted(set(runs["seed"])))
    utterances = ", ".join(str(count) for count in sorted(set(runs["n_utterances"])))
    return (
        f"Ours: {scale.name} scale, {models}, WER on {utterances} utterances, greedy CTC; "
        f"calibration seeds {seeds}; {devices}."
    )
