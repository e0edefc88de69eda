"""Console command ``sparsewav-summary``: the runs of a sweep in one table."""

import json
import sys
from pathlib import Path
from typing import Any

import pandas
from rich import box
from rich.console import Console
from rich.table import Table

from sparsewav.errors import UserError
from sparsewav.files import write_file
from sparsewav.pipeline import run_folder
from sparsewav.pipeline.naming import LATER_CHOICES, papers_choice
from sparsewav.progress import print_error, print_warning
from sparsewav.settings.baselines import OURS

SUMMARY = "summary.csv"

_SHOWN = {
    **{key: key for key in ("method", "saliency", "solver", "objective", "recovery", "allocation")},
    "finetune_strategy": "tuning",
    "target_sparsity": "asked",
    "achieved_sparsity": "reached",
    "wer_dense": "dense WER",
    "wer_pruned": "pruned WER",
    "wer": "WER",
    "divergence": "divergence",
    "updates": "updates",
    "evaluation_overlap": "evaluated on seen",
    "prune_seconds": "seconds",
    "status": "status",
}
"""The columns that the terminal shows, with their headings."""


def collect(folder: Path) -> pandas.DataFrame:
    """Read the finished and failed runs in a folder into a table with a row for each; damaged records are named."""
    rows: list[dict[str, Any]] = []
    for path in sorted(folder.glob(f"*/{run_folder.METRICS}")):
        try:
            metrics = run_folder.read_metrics(path.parent)
        except UserError as error:
            print_warning(f"left out: {error}")
            continue
        seconds = metrics.pop("seconds")
        flat = {key: value for key, value in metrics.items() if not isinstance(value, (dict, list))}
        rows.append(
            {"run": path.parent.name, "status": "done"} | flat | {f"{k}_seconds": v for k, v in seconds.items()}
        )
    for path in sorted(folder.glob(f"*/{run_folder.ERROR}")):
        row = {"run": path.parent.name, "status": "failed"}
        try:
            failure = json.loads(path.read_text(encoding="utf-8"))
            target = [item.partition("=")[2] for item in failure["overrides"] if item.startswith("sparsity.target=")]
            asked = {"target_sparsity": float(target[0])} if target else {}
            rows.append(row | {"error": failure["error"]} | failure["choices"] | asked)
        except (OSError, ValueError, KeyError, TypeError):
            rows.append(row | {"error": f"{path} is damaged; launch the run again"})
    return pandas.DataFrame(rows)


def summarize(folder: Path, console: Console) -> int:
    """Write ``summary.csv`` in the folder of a sweep, show it, and give the number of failed runs."""
    table = collect(folder)
    if table.empty:
        console.print(f"{folder} has no runs")
        return 0
    keys = ("method", "saliency", *LATER_CHOICES, "allocation", "finetune_strategy", "target_sparsity", "seed", "run")
    order = [column for column in keys if column in table]
    table = table.sort_values(order)
    with write_file(folder / SUMMARY) as temporary:
        table.to_csv(temporary, index=False)
    shown = Table(title=f"{len(table)} runs in {folder}", box=box.SIMPLE, pad_edge=False)
    failed = int((table["status"] == "failed").sum())
    columns = [column for column in _SHOWN if column in table and (column != "status" or failed)]
    if "method" in table and set(table["method"]) <= {OURS}:
        columns.remove("method")
    if "updates" in table and not table["updates"].any():  # without fine-tuning the two WERs are equal
        columns = [column for column in columns if column not in ("finetune_strategy", "wer_pruned", "updates")]
    if "evaluation_overlap" in table and not table["evaluation_overlap"].any():
        columns.remove("evaluation_overlap")
    columns = [
        column
        for column in columns
        if column not in LATER_CHOICES or set(table[column].dropna()) != {papers_choice(column)}
    ]
    columns = [column for column in columns if not column.startswith(("wer", "div")) or table[column].notna().any()]
    for column in columns:
        shown.add_column(_SHOWN[column], justify="right" if table[column].dtype.kind == "f" else "left")
    for row in table[columns].itertuples(index=False):
        shown.add_row(*(_show(column, value) for column, value in zip(columns, row, strict=True)))
    console.print(shown)
    console.print(f"Summary: {folder / SUMMARY}")
    return failed


def _show(column: str, value: Any) -> str:
    if pandas.isna(value):
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{100 * value:.2f} %" if column.startswith("wer") else f"{value:.4g}"


def main() -> None:
    """Console entry ``sparsewav-summary FOLDER``: write and show the summary of a sweep's folder again."""
    console = Console()
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        console.print("usage: sparsewav-summary FOLDER    (the folder of a sweep, e.g. outputs/methods)")
        raise SystemExit(0 if sys.argv[1:] in (["-h"], ["--help"]) else 2)
    folder = Path(sys.argv[1])
    if not folder.is_dir():
        print_error(f"{folder} is not a folder; give the folder of a sweep")
        raise SystemExit(1)
    raise SystemExit(1 if summarize(folder, console) else 0)
