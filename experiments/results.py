"""What a table or figure is, before and after it is drawn."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import yaml

from experiments.sweeps import CHOICES, Scale, Sweep
from sparsewav.errors import UserError
from sparsewav.files import content_hash, write_file
from sparsewav.pipeline import run_folder

WARNINGS = 3
"""How many different warnings of the runs a table repeats."""
EQUAL = 0.0005
"""Sparsities that differ by less count as the same: tables print a tenth of a percent."""


@dataclass(frozen=True)
class Result:
    """A finished table or figure.

    Attributes:
        notes: Sentences to print below it.
        files: The files that were written, with the PNG of a figure first.
        table: The printed cells of a table, or of the table beside a figure. Every row says how many updates and seeds
            it has and which sparsity it reached.
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

    @property
    def caption(self) -> str:
        """The title without the number, which a document gives itself."""
        text = self.title.partition(": ")[2]
        return text[0].upper() + text[1:]

    def files(self, scale: Scale, *suffixes: str) -> list[Path]:
        """Paths of the item's files with these suffixes."""
        return [scale.folder / f"{self.name}.{suffix}" for suffix in suffixes]


def paper() -> dict[str, Any]:
    """The figures that the paper reports, as ``paper.yaml`` has them."""
    return yaml.safe_load((Path(__file__).parent / "paper.yaml").read_text(encoding="utf-8"))


def summarize(runs: pandas.DataFrame, folder: Path) -> dict[str, Any]:
    """The columns that a CSV in a folder has of the runs behind one figure, which differ in their seeds alone.

    Returns:
        Means over the seeds of the WER and of the sparsity that was reached; the WER's standard deviation (NaN of one
        seed); dense WER; number of seeds, updates of the fine-tuning, the asked sparsity, and the runs' folders as seen
        from the CSV's. WERs and sparsities are fractions.

    Raises:
        UserError: The runs differ in more than their seeds.
    """
    for key in (*CHOICES, "model", "target_sparsity", "updates", "wer_dense", "evaluation_set"):
        if runs[key].map(str).nunique() > 1:
            values = ", ".join(map(str, dict.fromkeys(runs[key])))
            raise UserError(
                f"runs that differ in {key} ({values}) are not averaged: {', '.join(runs['run'])}; make those of them "
                "again that are out of date (force=true)"
            )
    if runs["seed"].duplicated().any():
        raise UserError(f"several runs have the same seed and are not averaged: {', '.join(runs['run'])}; keep one")
    first = runs.iloc[0]
    return {
        "target_sparsity": first["target_sparsity"],
        "achieved_sparsity": runs["achieved_sparsity"].mean(),
        "updates": int(first["updates"]),
        "seeds": len(runs),
        "wer_dense": first["wer_dense"],
        "wer_mean": runs["wer"].mean(),
        "wer_deviation": runs["wer"].std(),
        "runs": "; ".join(relative_to(run, folder) for run in runs["run"]),
    }


def write_measured(path: Path, table: pandas.DataFrame, runs: list[Path]) -> None:
    """Write what was measured of the models of runs, with the hash of each run's metrics.

    Args:
        path: A CSV file.
        table: Its column ``run`` has the folder of a run, or names the dense model.
        runs: The runs' folders.
    """
    with write_file(path) as temporary:
        table.assign(metrics=table["run"].map(_fingerprints(runs))).to_csv(temporary, index=False)


def measured_before(path: Path, runs: list[Path], figures: list[str]) -> pandas.DataFrame | None:
    """What was measured of these very runs and not of others, nor before one was made again; None if there is no such.

    Args:
        path: What :func:`write_measured` wrote.
        runs: The runs' folders.
        figures: Columns that have to be finite.
    """
    try:
        table = pandas.read_csv(path)
        known = table.dropna(subset="metrics").set_index("run")["metrics"].to_dict()
        finite = bool(np.isfinite(table[figures]).all(axis=None))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return table if finite and known == _fingerprints(runs) else None


def _fingerprints(runs: list[Path]) -> dict[str, str]:
    """Hashes of the runs' metrics, which tell whether a run was made again after it was measured."""
    return {str(run): content_hash(run / run_folder.METRICS) for run in runs}


def relative_to(run: str, folder: Path) -> str:
    """The path of a run as seen from a folder, if it lies in it."""
    return str(Path(run).relative_to(folder)) if Path(run).is_relative_to(folder) else run


def reached(sparsity: float) -> str:
    """A sparsity as tables print it."""
    return f"{100 * sparsity:.1f} %"


def percent(sparsity: float) -> str:
    """A sparsity that was asked for, as tables print it."""
    return f"{100 * sparsity:g} %"


def signed(points: float, digits: int = 2) -> str:
    """A difference as tables print it, with the sign that typography has for minus."""
    text = f"{points:+.{digits}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "−")


def seeds_of(runs: pandas.DataFrame, keys: list[str]) -> str:
    """How many seeds the groups of some runs have: ``3 seeds``, or ``1 to 3 seeds``."""
    counts = sorted(set(runs.groupby(keys)["seed"].nunique()))
    return f"{counts[0]} to {counts[-1]} seeds" if len(counts) > 1 else counted(counts[0], "seed")


def counted(count: int, noun: str) -> str:
    """``1 seed``, ``2 seeds``."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def describe(runs: pandas.DataFrame, scale: Scale) -> list[str]:
    """Sentences on the models, data and devices of some runs, and on what the runs warned of."""
    devices = ", ".join(sorted(set(runs["device"])))
    models = ", ".join(dict.fromkeys(runs["model"]))
    seeds = ", ".join(str(seed) for seed in sorted(set(runs["seed"])))
    utterances = ", ".join(str(count) for count in sorted(set(runs["n_utterances"])))
    settings = f", {' '.join(scale.overrides)}" if scale.overrides else ""
    alike: dict[str, list[str]] = {}  # those that differ in their numbers alone
    for warning in (warning for run in runs["warnings"] for warning in run):
        alike.setdefault(re.sub(r"\d+", "0", warning), []).append(warning)
    kinds = sorted(alike.values(), key=len, reverse=True)
    listed = "; ".join(
        f"{kind[0]} ({len(kind)} of {len(runs)} runs{', with other numbers' if len(set(kind)) > 1 else ''})"
        for kind in kinds[:WARNINGS]
    )
    rest = f"; and {counted(len(kinds) - WARNINGS, 'other')}" if len(kinds) > WARNINGS else ""
    return [
        f"Ours: {scale.name} scale{settings}, {models}, WER on {utterances} utterances, greedy CTC; "
        f"calibration seeds {seeds}; {devices}.",
        *([f"Warnings of the runs: {listed}{rest}."] if kinds else []),
    ]
