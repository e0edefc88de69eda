"""``python -m experiments``: run what is missing of the paper's tables and figures, and draw them.

Usage: ./reproduce.sh [demo | paper] [all | table1 ... figure6] [options] [-- key=value ...]
"""

import argparse
import sys
import time
from contextlib import suppress
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from experiments.estimate import estimate, training_seconds
from experiments.ours import figure5, figure6, table4
from experiments.page import write_page
from experiments.paper import figure1, figure2, figure3, figure4, table1, table2, table3
from experiments.results import Item, Result
from experiments.sweeps import Scale, Sweep, jobs, launch
from sparsewav.errors import UserError

ITEMS: dict[str, Item] = {
    "table1": table1.ITEM,
    "figure1": figure1.ITEM,
    "figure2": figure2.ITEM,
    "figure3": figure3.ITEM,
    "figure4": figure4.ITEM,
    "table2": table2.ITEM,
    "table3": table3.ITEM,
    "table4": table4.ITEM,
    "figure5": figure5.ITEM,
    "figure6": figure6.ITEM,
}

LONG = ("table4", "figure5")
"""Items that ``full`` has and ``all`` has not: hours of runs at demo scale."""

EPILOG = """examples:
  ./reproduce.sh                         the paper's tables and figures at demo scale: 2 CPU cores, nothing to fetch but
                                         PyPI
  ./reproduce.sh full                    ours, too: table4 and figure5, hours more
  ./reproduce.sh table1 figure4          some of them
  ./reproduce.sh paper --dry-run         list the jobs at paper scale: LibriSpeech, published checkpoints, a GPU
  ./reproduce.sh --draw                  draw again what is finished, without running anything
  ./reproduce.sh table1 figure1 --output outputs/mine -- model.name_or_path=/path/to/model \\
      data=librispeech_dir data.root=/path/to/corpus
                                         the same for your own model and speech
  ./reproduce.sh -- hydra/launcher=joblib hydra.launcher.n_jobs=4
                                         several runs at once (not for table3, which is timed)

Stopped, even killed, it goes on where it was when launched again; what is done is not done again.
"""


def main() -> int:
    """Run the command line; returns the exit code."""
    arguments = _parse(sys.argv[1:])
    console = Console(width=None if sys.stdout.isatty() else 160)  # in a log, room for the tables
    folder = arguments.output or Path("outputs") / arguments.scale
    launcher = tuple(word for word in arguments.overrides if word.startswith("hydra"))
    settings = tuple(word for word in arguments.overrides if not word.startswith("hydra"))
    scale = Scale(arguments.scale, folder, settings)
    try:
        sweeps = list(dict.fromkeys(sweep for name in arguments.items for sweep in ITEMS[name].sweeps))
        if arguments.dry_run:
            _show_plan(sweeps, scale, console)
            return 0
        started = time.perf_counter()
        failed = []
        drawn: dict[str, Result] = {}
        for name in arguments.items:
            missing = 0 if arguments.draw else _run(name, scale, launcher, console)
            result = _draw(name, scale, console)
            if result:
                drawn[name] = result
            failed += [name] if missing or not result else []
        _write_page(scale, drawn, console)
        console.print(f"{time.perf_counter() - started:.0f} seconds")
        if failed:
            console.print(f"[bold red]not done:[/bold red] {', '.join(failed)}; the same command does what is missing")
    except UserError as error:
        console.print(f"[bold red]error:[/bold red] {escape(str(error))}", soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        console.print("interrupted; the same command goes on where it stopped")
        return 130
    return 1 if failed else 0


def _usual() -> list[str]:
    return [name for name in ITEMS if name not in LONG]


def _parse(words: list[str]) -> argparse.Namespace:
    overrides: list[str] = []
    if "--" in words:
        words, overrides = words[: words.index("--")], words[words.index("--") + 1 :]
    parser = argparse.ArgumentParser(
        prog="./reproduce.sh",
        description="Regenerate the paper's tables and figures: run what is missing, then draw.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar="demo|paper|all|full|table1..4|figure1..6",
        help="scale (default demo), and tables and figures (default all)",
    )
    parser.add_argument("--dry-run", action="store_true", help="list the jobs and an estimate; run nothing")
    parser.add_argument("--draw", action="store_true", help="draw what is finished; run nothing")
    parser.add_argument("--output", type=Path, help="folder of runs, tables and figures (default outputs/<scale>)")
    arguments = parser.parse_args(words)
    arguments.overrides = overrides
    arguments.scale, arguments.items = "demo", []
    for word in arguments.words:
        if word in ("demo", "paper"):
            arguments.scale = word
        elif word == "full":
            arguments.items += ITEMS
        elif word == "all":
            arguments.items += _usual()
        elif word in ITEMS:
            arguments.items.append(word)
        else:
            parser.error(
                f"{word} is neither demo, paper, all, full nor one of {', '.join(ITEMS)}; settings go behind --"
            )
    arguments.items = list(dict.fromkeys(arguments.items)) or _usual()
    return arguments


def _run(name: str, scale: Scale, launcher: tuple[str, ...], console: Console) -> int:
    """Launch every sweep of an item that misses runs; gives how many are missing afterwards."""
    missing = 0
    for sweep in ITEMS[name].sweeps:
        if all(job.done for job in jobs(sweep, scale)):
            continue
        extra = () if sweep.experiment == "timing" else launcher
        console.rule(f"{name}: {escape(sweep.command(scale))}")
        missing += launch(sweep, scale, extra)
    measure = ITEMS[name].measure
    if measure and not missing:
        measure(scale)
    return missing


def _draw(name: str, scale: Scale, console: Console) -> Result | None:
    """Draw one item and show it; None, with the reason on the terminal, if it cannot be drawn."""
    try:
        result = ITEMS[name].make(scale)
    except UserError as error:
        console.print(f"[bold red]{name}:[/bold red] {escape(str(error))}", soft_wrap=True)
        return None
    _show(result, console)
    return result


def _write_page(scale: Scale, drawn: dict[str, Result], console: Console) -> None:
    """Write the page with every item that is finished, those of earlier launches, too."""
    finished: dict[str, tuple[Item, Result]] = {}
    for name, item in ITEMS.items():
        if name in drawn:
            finished[name] = (item, drawn[name])
        elif all(job.done for sweep in item.sweeps for job in jobs(sweep, scale)):
            with suppress(UserError):  # not measured yet
                finished[name] = (item, item.make(scale))
    if finished:
        console.print(f"Everything on one page: {write_page(scale, finished)}")


def _show(result: Result, console: Console) -> None:
    if result.table is not None:
        shown = Table(title=result.title)
        for column in result.table.columns:
            shown.add_column(column, overflow="fold")
        for row in result.table.astype(object).where(result.table.notna(), "–").itertuples(index=False):
            shown.add_row(*(escape(str(cell)) for cell in row))
        console.print(shown)
    else:
        console.print(f"[bold]{result.title}[/bold]")
    for note in result.notes:
        console.print(f"  {escape(note)}", style="dim", soft_wrap=True)
    console.print("  " + "  ".join(str(path) for path in result.files), soft_wrap=True)


def _show_plan(sweeps: list[Sweep], scale: Scale, console: Console) -> None:
    plan = Table(title=f"{scale.name} scale, in {scale.folder}")
    for column in ("command", "runs", "done", "updates each", "seconds to go, estimated"):
        plan.add_column(column, justify="left" if column == "command" else "right", overflow="fold")
    total = training_seconds(sweeps, scale)
    training = total
    for sweep in sweeps:
        found = jobs(sweep, scale)
        guess = estimate(sweep, scale)
        total += guess.seconds
        plan.add_row(
            escape(sweep.command(scale)),
            str(len(found)),
            str(sum(job.done for job in found)),
            guess.updates,
            f"{guess.seconds:,.0f}",
        )
    if training:
        plan.add_row("training of the demo's models, on first use", "", "", "", f"{training:,.0f}")
    console.print(plan)
    for sweep in sweeps:
        for job in jobs(sweep, scale):
            state = "done" if job.done else "to do"
            console.print(f"  {state:5}  {job.folder}", soft_wrap=True, highlight=False)
    runs = sum(len(jobs(sweep, scale)) for sweep in sweeps)
    console.print(
        f"{runs} runs; about {total / 60:,.0f} minutes to go, on the hardware named in experiments/estimate.py"
    )


if __name__ == "__main__":
    raise SystemExit(main())
