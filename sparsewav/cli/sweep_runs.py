"""The runs of a sweep as a table, and which of their settings vary."""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from math import isclose
from pathlib import Path
from typing import Any

import pandas
import yaml

from sparsewav.errors import UserError
from sparsewav.files import conf_folder
from sparsewav.inference.bootstrap import bootstrap_difference
from sparsewav.inference.wer import count_edits, unspaced
from sparsewav.pipeline import run_folder
from sparsewav.pipeline.naming import LATER_CHOICES, SETTINGS, changes_results, papers_choice
from sparsewav.progress import print_warning
from sparsewav.settings.baselines import OURS
from sparsewav.settings.pruning import TRANSFORMER

TARGET = "sparsity.target"


@dataclass(frozen=True)
class Sweep:
    """The runs in a folder.

    Attributes:
        folder: The folder.
        runs: A row a run, with its settings by their keys on the command line, and its figures as in ``metrics.json``.
        axes: The settings that vary, those of the sparsity and the seed last.
        shared: The settings that all runs share.
    """

    folder: Path
    runs: pandas.DataFrame
    axes: list[str]
    shared: dict[str, Any]

    @property
    def failed(self) -> pandas.DataFrame:
        """The runs that failed; ``error`` says why."""
        return self.runs[self.runs["status"] == "failed"]

    def varies(self, column: str) -> bool:
        """Whether the finished runs have several values in a column."""
        return column in self.runs and self.runs[column].dropna().astype(str).nunique() > 1

    def labels(self, key: str) -> list[str]:
        """Give the values of a setting as tables and figures show them: paths without what they have in common."""
        values = ["-" if pandas.isna(value) else str(value) for value in self.runs[key]]
        values = [text.removesuffix(".0") if self.runs[key].dtype.kind == "f" else text for text in values]
        if not all(text == "-" or Path(text).is_absolute() for text in values):
            return values
        paths = [text for text in values if text != "-"]
        common = os.path.commonpath(paths) if len(set(paths)) > 1 else os.path.dirname(paths[0])
        return [text if text == "-" else os.path.relpath(text, common) for text in values]

    def any(self, column: str) -> bool:
        """Whether a run has a value in a column, and not only zeros."""
        return column in self.runs and bool(self.runs[column].fillna(0).astype(bool).any())


def read_sweep(folder: Path) -> Sweep:
    """Read the finished and failed runs in a folder; damaged records are named and left out."""
    rows = [*_finished(folder), *_failed(folder)]
    if not rows:
        return Sweep(folder, pandas.DataFrame(), [], {})
    overrides = [_overrides(row, folder / row["run"]) for row in rows]
    keys = list(dict.fromkeys(key for chosen in overrides for key in chosen))
    settings = pandas.DataFrame(
        [
            {key: chosen[key] if key in chosen else _composed(folder / row["run"], key) for key in keys}
            for row, chosen in zip(rows, overrides, strict=True)
        ]
    )
    axes = [key for key in keys if settings[key].map(str).nunique() > 1]
    last = [key for key in axes if key == "seed" or key.partition(".")[0] == "sparsity"]
    axes = [key for key in axes if key not in last] + sorted(last, key=lambda key: key == "seed")
    figures = pandas.DataFrame(rows)
    # A figure says what was used: no saliency where the solver uses none, and a name for the path of a model.
    used = {key: [row.get(key, chosen) for row, chosen in zip(rows, settings[key], strict=True)] for key in keys}
    runs = figures.assign(**used)
    done = runs[runs["status"] == "done"]
    if len(done) > 1 and (not axes or done.duplicated(axes).any()):  # made with other defaults, or of other content
        axes.append("run")
    if axes:
        runs = runs.sort_values(axes, key=_order, ignore_index=True)
    shared = {key: settings[key].iloc[0] for key in keys if key not in axes and key not in figures}
    return Sweep(folder, runs, axes, _shared_choices(runs, axes) | shared)


def _finished(folder: Path) -> Iterable[dict[str, Any]]:
    for path in sorted(folder.glob(f"*/{run_folder.METRICS}")):
        try:
            metrics = run_folder.read_metrics(path.parent)
        except UserError as error:
            print_warning(f"left out: {error}")
            continue
        seconds, cached = metrics.pop("seconds"), metrics.pop("seconds_cached", None) or {}
        flat = {key: value for key, value in metrics.items() if not isinstance(value, (dict, list))}
        pruning = [cached[piece] for piece in ("calibrate", "allocate") if piece in cached]
        yield (
            {"run": path.parent.name, "status": "done"}
            | flat
            | {f"{piece}_seconds": value for piece, value in seconds.items()}
            | {"seconds_cached": sum(pruning)}
            | _other_sets(metrics)
            | _delta(path.parent, metrics)
        )


def _other_sets(metrics: dict[str, Any]) -> dict[str, float]:
    """Give the rates of all evaluation sets but the first, whose rates are the run's, as ``name/wer`` and so on."""
    others = (metrics.get("evaluation") or [])[1:]
    return {
        f"{record['name']}/{key}": record[key]
        for record in others
        for key in (*run_folder.RATES, "divergence")
        if record.get(key) is not None
    }


def _delta(run: Path, metrics: dict[str, Any]) -> dict[str, float]:
    """Give the difference to the dense model's error rate with its interval, from the transcripts of the first set.

    The rate is that of words, or of characters where most transcripts have no spaces. There is none where the
    transcripts are gone or give another rate than the metrics, and of an encoder, which has no transcripts.
    """
    try:
        rows = pandas.read_json(run / run_folder.PREDICTIONS, lines=True, dtype=False)
        rows = rows[rows["set"] == rows["set"].iloc[0]] if "set" in rows else rows
        references, before, after = (rows[key].tolist() for key in ("reference", "before", "after"))
    except (OSError, ValueError, KeyError, IndexError):
        return {}
    rate = "cer" if "cer" in metrics and unspaced(references) else "wer"
    edits, lengths = count_edits(references, after, characters=rate == "cer")
    edits_before, _ = count_edits(references, before, characters=rate == "cer")
    value, low, high = bootstrap_difference(edits[None], edits_before[None], lengths, None)
    if not isclose(value, (metrics[rate] or 0) - (metrics[f"{rate}_dense"] or 0), abs_tol=1e-9):
        return {}
    column = f"{rate}_delta"
    return {column: value, f"{column}_low": low, f"{column}_high": high}


def _failed(folder: Path) -> Iterable[dict[str, Any]]:
    for path in sorted(folder.glob(f"*/{run_folder.ERROR}")):
        row = {"run": path.parent.name, "status": "failed"}
        try:
            failure = json.loads(path.read_text(encoding="utf-8"))
            target = [item.partition("=")[2] for item in failure["overrides"] if item.startswith(f"{TARGET}=")]
            asked = {"target_sparsity": float(target[-1])} if target else {}
            yield row | {"error": str(failure["error"]), "overrides": failure["overrides"]} | asked
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            yield row | {"error": f"{path} is damaged; launch the run again"}


def _overrides(row: dict[str, Any], run: Path) -> dict[str, Any]:
    """Give what the command line and the sweep chose for a run, by key; takes them out of the row of a failed run.

    What changes no result is left out, as the folder of the output.
    """
    overrides = row.pop("overrides", None) or _read_yaml(run / SETTINGS / "overrides.yaml") or []
    pairs = [str(item).lstrip("+").partition("=")[::2] for item in overrides if changes_results(str(item))]
    return {key: _value(text) for key, text in pairs}


def _composed(run: Path, key: str) -> Any:
    """Give the value of a key, or the option that is chosen in a group, where the run did not override it."""
    is_group = (conf_folder() / key).is_dir()
    found = _read_yaml(run / SETTINGS / ("hydra.yaml" if is_group else "config.yaml"))
    for part in ("hydra", "runtime", "choices", key) if is_group else key.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found if isinstance(found, int | float | str | None) else str(found)


def _read_yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return None


def _value(text: str) -> Any:
    """Give a number for a number, and the text of anything else."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _order(column: pandas.Series) -> pandas.Series:
    """Sort numbers by value and everything else by its text."""
    numbers = pandas.to_numeric(column, errors="coerce")
    return numbers if numbers.notna().all() else column.astype(str)


def _shared_choices(runs: pandas.DataFrame, axes: list[str]) -> dict[str, Any]:
    """Give the model and the main choices that all finished runs share, but those of the paper that need no word."""
    unsaid = {"method": OURS, "finetune_strategy": "none", "scope": TRANSFORMER} | {
        group: papers_choice(group) for group in LATER_CHOICES
    }
    names = ("model", "method", "saliency", *LATER_CHOICES, "scope", "allocation", "finetune_strategy")
    columns = {name: name for name in names if name in runs} | {TARGET: "target_sparsity"}
    found: dict[str, Any] = {}
    for key, column in columns.items():
        values = runs[column].dropna().unique() if column in runs else []
        if key not in axes and len(values) == 1 and values[0] != unsaid.get(key):
            found[key] = values[0]
    return found
