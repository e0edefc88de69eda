"""``python -m experiments``, the command behind ``./reproduce.sh``: run what is missing and draw tables and figures."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from experiments.estimate import estimate, training_seconds
from experiments.items import ITEMS, OURS, PAPER
from experiments.page import write_page
from experiments.results import Item, Result
from experiments.sweeps import MODELS, Scale, Sweep, check_roles, jobs, launch
from sparsewav.cli.explain import explain
from sparsewav.errors import UserError

GROUPS = {"all": [item for item in ITEMS.values() if not item.hours], "full": list(ITEMS.values())}
"""The words that stand for several items; the first one is the default."""

EXAMPLES = """examples:
  ./reproduce.sh                         the default items at demo scale: 2 CPU cores, nothing to fetch but PyPI
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
        if arguments.dry_run:
            _show_plan(arguments.items, scale, console)
            return 0
        started = time.perf_counter()
        failed = []
        drawn: dict[str, Result] = {}
        for item in arguments.items:
            missing = 0 if arguments.draw else _run(item, scale, launcher, console)
            result = _draw(item, scale, console)
            if result:
                drawn[item.name] = result
            failed += [item.name] if missing or not result else []
        _write_page(scale, drawn, console)
        console.print(f"{time.perf_counter() - started:.0f} seconds")
        if failed:
            console.print(f"[bold red]not done:[/bold red] {', '.join(failed)}; the same command does what is missing")
    except UserError as error:
        console.print(f"[bold red]error:[/bold red] {escape(str(error))}", soft_wrap=True)
        return 1
    except (HydraException, OmegaConfBaseException) as error:  # of the settings behind --
        console.print(f"[bold red]error:[/bold red] {escape(explain(error, 'config'))}", soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        console.print("interrupted; the same command goes on where it stopped")
        return 130
    return 1 if failed else 0


def _epilog() -> str:
    """The items with their titles, the words that stand for several, and examples."""
    *most, last = [item.name for item in ITEMS.values() if item.hours]
    hours = f"{', '.join(most)} and {last}"
    lists = {
        "items of the paper": [(item.name, item.title) for item in PAPER],
        "items of this project": [(item.name, item.title) for item in OURS],
        "several items": [("all", f"every item but {hours} (default)"), ("full", f"every item; {hours} take hours")],
    }
    rows = {title: "\n".join(f"  {name:<16} {text}" for name, text in pairs) for title, pairs in lists.items()}
    return "\n\n".join([*(f"{title}:\n{text}" for title, text in rows.items()), EXAMPLES])


def _parse(words: list[str]) -> argparse.Namespace:
    overrides: list[str] = []
    if "--" in words:
        words, overrides = words[: words.index("--")], words[words.index("--") + 1 :]
    parser = argparse.ArgumentParser(
        prog="./reproduce.sh",
        description="Regenerate the paper's tables and figures, and this project's: run what is missing, then draw.",
        epilog=_epilog(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar="|".join([*MODELS, *GROUPS, "item"]),
        help=f"the scale (default {next(iter(MODELS))}) and the items (default {next(iter(GROUPS))})",
    )
    parser.add_argument("--dry-run", action="store_true", help="list the jobs and an estimate; run nothing")
    parser.add_argument("--draw", action="store_true", help="draw what is finished; run nothing")
    parser.add_argument("--output", type=Path, help="folder of runs, tables and figures (default outputs/<scale>)")
    arguments = parser.parse_args(words)
    arguments.overrides = overrides
    arguments.scale, chosen = next(iter(MODELS)), []
    for word in arguments.words:
        if word in MODELS:
            arguments.scale = word
        elif word in GROUPS:
            chosen += GROUPS[word]
        elif word in ITEMS:
            chosen.append(ITEMS[word])
        else:
            choices = ", ".join([*MODELS, *GROUPS, *ITEMS])
            parser.error(f"{word} is none of {choices}; settings go behind --")
    arguments.items = list(dict.fromkeys(chosen or next(iter(GROUPS.values()))))
    return arguments


def _run(item: Item, scale: Scale, launcher: tuple[str, ...], console: Console) -> int:
    """Launch every sweep of an item that misses runs, then measure; returns how many runs are still missing.

    Nothing is launched of an item that cannot be drawn; :func:`_draw` says why.
    """
    missing = 0
    try:
        check_roles(item.sweeps, scale)
    except UserError:
        return len(item.sweeps)
    for sweep in item.sweeps:
        if all(job.done for job in jobs(sweep, scale)):
            continue
        extra = () if sweep.experiment == "paper/timing" else launcher
        console.rule(f"{item.name}: {escape(sweep.command(scale))}")
        missing += launch(sweep, scale, extra)
    if item.measure and not missing:
        item.measure(item, scale)
    return missing


def _draw(item: Item, scale: Scale, console: Console) -> Result | None:
    """Draw one item and show it; None, with the reason on the terminal, if it cannot be drawn."""
    try:
        result = item.make(item, scale)
    except UserError as error:
        console.print(f"[bold red]{item.name}:[/bold red] {escape(str(error))}", soft_wrap=True)
        return None
    _show(item, result, console)
    return result


def _write_page(scale: Scale, drawn: dict[str, Result], console: Console) -> None:
    """Write the page with every finished item, including those of earlier launches."""
    finished: list[tuple[Item, Result]] = []
    for item in ITEMS.values():
        if item.name in drawn:
            finished.append((item, drawn[item.name]))
        elif all(job.done for sweep in item.sweeps for job in jobs(sweep, scale)):
            try:
                finished.append((item, item.make(item, scale)))
            except UserError as error:  # not measured yet, or damaged
                console.print(f"{item.name} is not on the page: {escape(str(error))}", style="yellow", soft_wrap=True)
    if finished:
        console.print(f"Everything on one page: {write_page(scale, finished)}")


def _show(item: Item, result: Result, console: Console) -> None:
    if result.table is not None:
        shown = Table(title=item.title)
        for column in result.table.columns:
            shown.add_column(column, overflow="fold")
        for row in result.table.astype(object).where(result.table.notna(), "–").itertuples(index=False):
            shown.add_row(*(escape(str(cell)) for cell in row))
        console.print(shown)
    else:
        console.print(f"[bold]{item.title}[/bold]")
    for note in result.notes:
        console.print(f"  {escape(note)}", style="dim", soft_wrap=True)
    console.print("  " + "  ".join(str(path) for path in result.files), soft_wrap=True)


def needed_by(sweep: Sweep) -> list[str]:
    """Names of all items that read the runs of a sweep."""
    return [item.name for item in ITEMS.values() if sweep in item.sweeps]


def _show_plan(items: Sequence[Item], scale: Scale, console: Console) -> None:
    sweeps = list(dict.fromkeys(sweep for item in items for sweep in item.sweeps))
    plan = Table(title=f"{scale.name} scale, in {scale.folder}")
    plan.add_column("command", overflow="fold")
    plan.add_column("needed by", max_width=max(map(len, ITEMS)))  # a name a line leaves room for the command
    for column in ("runs", "done", "updates each", "estimated seconds"):
        plan.add_column(column, justify="right", overflow="fold")
    total = training = training_seconds(sweeps, scale)
    found = [job for sweep in sweeps for job in jobs(sweep, scale)]
    for sweep in sweeps:
        guess = estimate(sweep, scale)
        total += guess.seconds
        plan.add_row(
            escape(sweep.command(scale)),
            "\n".join(needed_by(sweep)),
            str(len(jobs(sweep, scale))),
            str(sum(job.done for job in jobs(sweep, scale))),
            guess.updates,
            f"{guess.seconds:,.0f}",
        )
    if training:
        plan.add_row("training of the demo's models, on first use", "", "", "", "", f"{training:,.0f}")
    console.print(plan)
    for job in found:
        console.print(f"  {'done' if job.done else 'to do':5}  {job.folder}", soft_wrap=True, highlight=False)
    console.print(
        f"{len(found)} runs; about {total / 60:,.0f} minutes to go, on the hardware named in experiments/estimate.py"
    )


if __name__ == "__main__":
    raise SystemExit(main())
