"""Console command ``sparsewav-summary``: the runs of a sweep in one table and one figure."""

import re
from pathlib import Path

import pandas
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from sparsewav.cli.command import command_parser, exit_on_user_error
from sparsewav.cli.sweep_figure import draw
from sparsewav.cli.sweep_runs import Sweep, read_sweep
from sparsewav.errors import UserError
from sparsewav.files import write_file

SUMMARY = "summary.csv"
FIGURE = "summary.png"

_ERRORS = ("wer", "cer")

_RESULTS = {
    "achieved_sparsity": "reached",
    "asked_speedup": "speed-up\nasked",
    "achieved_speedup": "speed-up\nmeasured",
    "bits": "bits",
    "bytes": "MB",
    **{f"{rate}_dense": f"dense\n{rate.upper()} %" for rate in _ERRORS},
    **{f"{rate}_pruned": f"pruned\n{rate.upper()} %" for rate in _ERRORS},
    "wer": "WER %",
    "wer_delta": "WER − dense\n[95 % interval]",
    "cer": "CER %",
    "cer_delta": "CER − dense\n[95 % interval]",
    "divergence": "divergence",
    "evaluation_overlap": "evaluated\non seen",
}
"""What the terminal shows of every run, with its headings."""

_BESIDE = {
    "updates": "updates",
    "prune_seconds": "seconds",
    "seconds_cached": "cached",
}
"""What it shows besides, if it is wide enough."""


def summarize(folder: Path, console: Console) -> int:
    """Write ``summary.csv`` and ``summary.png`` of a sweep in its folder, show it, and give how many runs failed."""
    sweep = read_sweep(folder)
    if sweep.runs.empty:
        console.print(f"{folder} has no runs")
        return 0
    with write_file(folder / SUMMARY) as temporary:
        sweep.runs.convert_dtypes().to_csv(temporary, index=False)
    figures = _figures(sweep)
    runs = "1 run" if len(sweep.runs) == 1 else f"{len(sweep.runs)} runs"
    console.print(f"[bold]{runs} in {escape(str(folder))}[/bold]", soft_wrap=True)
    console.print(_title(sweep), highlight=False, markup=False)
    narrow = {column: heading for column, heading in figures.items() if column not in _BESIDE}
    for shown in (figures, narrow):
        table = _table(sweep, shown)
        if console.measure(table, options=console.options.update(width=1000)).maximum <= console.width:
            console.print(table)
            break
    else:
        _show_records(sweep, figures, console)
    for row in sweep.failed.itertuples():
        console.print(f"[red]failed:[/red] {escape(f'{row.run}: {row.error}')}", soft_wrap=True)
    drawn = draw(sweep, folder / FIGURE)
    console.print(f"Summary: {folder / SUMMARY}" + (f", {FIGURE}" if drawn else ""), soft_wrap=True)
    return len(sweep.failed)


def _figures(sweep: Sweep) -> dict[str, str]:
    """Give the columns of figures that say something, with their headings."""
    others = {  # of the evaluation sets behind the first
        column: f"{column.rpartition('/')[0]}\n{_RESULTS[column.rpartition('/')[2]]}"
        for column in sweep.runs
        if re.search(r"/(wer|cer|divergence)$", column)
    }
    sizes = sweep.any("target_megabytes") or sweep.any("bits") or sweep.varies("quantization")
    return {
        column: heading
        for column, heading in (_RESULTS | others | _BESIDE | {"status": "status"}).items()
        if sweep.any(column)
        and (not column.endswith("_dense") or sweep.varies(column))
        and (not column.endswith("_pruned") or sweep.any("updates"))  # without fine-tuning the two are equal
        and (column not in ("updates", "bits") or sweep.varies(column))
        and (column != "asked_speedup" or "sparsity.speedup" not in sweep.axes)
        and (column != "bytes" or sizes)
        and (column != "status" or len(sweep.failed))
    }


def _title(sweep: Sweep) -> str:
    """Say what all runs share: their settings, and the dense model's errors where it is one."""
    settings = " ".join(f"{key}={value}" for key, value in sweep.shared.items())
    dense = ", ".join(
        f"dense {rate.upper()} {100 * sweep.runs[f'{rate}_dense'].max():.2f} %"
        for rate in _ERRORS
        if sweep.any(f"{rate}_dense") and not sweep.varies(f"{rate}_dense")
    )
    if dense and not sweep.varies("n_utterances"):
        dense += f" of {sweep.runs['n_utterances'].max():.0f} utterances"
    return "; ".join(part for part in (settings, dense) if part)


def _table(sweep: Sweep, figures: dict[str, str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    for key in sweep.axes:
        numeric = sweep.runs[key].dtype.kind in "fi"
        table.add_column(escape(key.replace(".", ".\n")), justify="right" if numeric else "left", no_wrap=True)
    for column, heading in figures.items():
        table.add_column(escape(heading), justify="left" if column == "status" else "right", no_wrap=True)
    settings = [sweep.labels(key) for key in sweep.axes]
    for index, row in sweep.runs.iterrows():
        shown = [column[index] for column in settings] + [_show(column, row) for column in figures]
        table.add_row(*map(escape, shown))
    return table


def _show_records(sweep: Sweep, figures: dict[str, str], console: Console) -> None:
    """Show a block of lines for every run: its settings, and below them its figures."""
    labels = {key: sweep.labels(key) for key in sweep.axes}
    for index, row in sweep.runs.iterrows():
        settings = [f"{key}={values[index]}" for key, values in labels.items() if values[index] != "-"]
        shown = [
            f"{' '.join(heading.partition('[')[0].replace('%', '').split())} {_show(column, row)}"
            for column, heading in figures.items()
            if _show(column, row) not in ("", "-")
        ]
        console.print()
        console.print(" ".join(settings), markup=False, highlight=False)
        console.print(Padding(escape(", ".join(shown)), (0, 0, 0, 4), expand=False))
    console.print()


def _show(column: str, row: pandas.Series) -> str:
    """Give a figure of a run as the terminal shows it: error rates in percent."""
    value = row[column]
    if column == "status":
        return "" if value == "done" else value
    if pandas.isna(value):
        return "-"
    if column.endswith("_delta"):
        low, high = (100 * row[f"{column}_{end}"] for end in ("low", "high"))
        return f"{100 * value:+.2f} [{low:+.2f}, {high:+.2f}]"
    if re.search(r"(^|/)(wer|cer)(_|$)", column):
        return f"{100 * value:.2f}"
    if column == "bytes":
        return f"{value / 1e6:.3f}"
    if column in ("bits", "asked_speedup"):
        return f"{value:.3g}"
    if column == "achieved_speedup":
        return f"{value:.3f}"
    if column.endswith("seconds") or column == "seconds_cached":
        return f"{value:.1f}"
    if column in ("updates", "evaluation_overlap"):
        return f"{value:.0f}"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def main() -> None:
    """Console entry ``sparsewav-summary FOLDER``: write and show the summary of a sweep's folder again."""
    parser = command_parser(
        "sparsewav-summary",
        "Show the runs in a folder, finished and failed, and write summary.csv and summary.png there.",
        "The exit code is 1 if a run has failed.",
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="of a sweep, e.g. outputs/methods")
    folder = parser.parse_args().folder
    with exit_on_user_error():
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder; give the folder of a sweep")
    raise SystemExit(1 if summarize(folder, Console()) else 0)
