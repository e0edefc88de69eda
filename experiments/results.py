"""What a table or figure is, once made; and the paper's own figures."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas
import yaml

from experiments.sweeps import Scale, Sweep


@dataclass(frozen=True)
class Result:
    """A finished table or figure.

    Attributes:
        title: caption.
        notes: sentences below it.
        table: cells as printed, of a table, or beside a figure.
        files: what was written, a figure's PNG first.
    """

    title: str
    notes: list[str]
    table: pandas.DataFrame | None = None
    files: list[Path] = field(default_factory=list)


@dataclass(frozen=True)
class Item:
    """A table or figure of the paper.

    Attributes:
        sweeps: whose runs it reads.
        make: reads them, writes its files and tells what it made.
        measure: what is to be measured of the runs' models once all are there, if anything.
    """

    sweeps: tuple[Sweep, ...]
    make: Callable[[Scale], Result]
    measure: Callable[[Scale], None] | None = None


def paper() -> dict[str, Any]:
    """The paper's own figures, as ``paper.yaml`` has them."""
    return yaml.safe_load((Path(__file__).parent / "paper.yaml").read_text(encoding="utf-8"))


def describe(runs: pandas.DataFrame, scale: Scale) -> str:
    """One sentence on where the figures of some runs come from."""
    devices = ", ".join(sorted(set(runs["device"])))
    models = ", ".join(dict.fromkeys(runs["model"]))
    seeds = ", ".join(str(seed) for seed in sorted(set(runs["seed"])))
    utterances = ", ".join(str(count) for count in sorted(set(runs["n_utterances"])))
    return (
        f"Ours: {scale.name} scale, {models}, WER on {utterances} utterances, greedy CTC; "
        f"calibration seeds {seeds}; {devices}."
    )
