"""Output on the terminal: progress of stages and errors, without messages of libraries."""

import logging
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

logger = logging.getLogger(__name__)
logger.addHandler(logging.NullHandler())  # else what is printed appears twice where no log is kept

INTERVAL = 60.0
"""Seconds between two lines that say how far a stage is, where no bar does."""


@contextmanager
def stage(console: Console, description: str) -> Iterator[Callable[[int, int], None]]:
    """Show how far some work is, and the seconds at the end; yields a function to call with (steps done, steps).

    A terminal shows a bar. Elsewhere, and in the log file always, a line says every :data:`INTERVAL` how far it is,
    also in work that has no steps.
    """
    started = time.perf_counter()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    hidden = not console.is_terminal  # in a file or a pipe a bar would only leave blank lines
    calls: list[tuple[float, int, int]] = []  # the first and the last: seconds, steps done, steps

    def advance(done: int, total: int) -> None:
        progress.update(task, completed=done, total=total)
        calls[1:] = [(time.perf_counter() - started, done, total)]

    with (
        Progress(*columns, console=console, transient=True, disable=hidden) as progress,
        reporting(description, console if hidden else None, calls),
    ):
        task = progress.add_task(escape(description), total=None)
        yield advance
    seconds = time.perf_counter() - started
    logger.info("%s: %.2f s", description, seconds)
    console.print(f"[green]✓[/green] {escape(description)} [dim]{seconds:.1f} s[/dim]")


@contextmanager
def reporting(
    description: str, console: Console | None, calls: Sequence[tuple[float, int, int]] = ()
) -> Iterator[None]:
    """Within the block, log a line every :data:`INTERVAL`, and print it where there is a console.

    Args:
        description: The work.
        console: The line is printed there.
        calls: The first and the last time that a step was done: seconds, steps done, steps.
    """
    started = time.perf_counter()
    ended = threading.Event()

    def report() -> None:
        while not ended.wait(INTERVAL):
            line = f"{description}: {_how_far(time.perf_counter() - started, calls)}"
            logger.info(line)
            if console:
                console.print(line, markup=False, highlight=False, soft_wrap=True)

    reporter = threading.Thread(target=report, daemon=True)
    reporter.start()
    try:
        yield
    finally:
        ended.set()
        reporter.join()


def _how_far(seconds: float, calls: Sequence[tuple[float, int, int]]) -> str:
    """Say e.g. ``120 of 369, 2:10, about 4:30 left``; without steps only how long it has taken."""
    if not calls:
        return _clock(seconds)
    (before, begun, _), (now, done, total) = calls[0], calls[-1]  # a resumed training does not begin at 0
    left = f", about {_clock((now - before) / (done - begun) * (total - done))} left" if done > begun else ""
    return f"{done:,} of {total:,}, {_clock(seconds)}{left}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


_collected: list[list[str]] = []


@contextmanager
def collect_warnings() -> Iterator[list[str]]:
    """Give a list that gets every sentence of :func:`print_warning` within the block."""
    _collected.append([])
    try:
        yield _collected[-1]
    finally:
        _collected.pop()


def print_warning(sentence: str, *, log: bool = True) -> None:
    """Print a sentence that the user should know, log it, and give it to the record of the run."""
    if log:
        logger.warning(sentence)
    for sentences in _collected:
        sentences.append(sentence)
    Console().print(f"! {sentence}", style="yellow", markup=False, highlight=False, soft_wrap=True)


def print_note(sentence: str) -> None:
    """Print a sentence on what was assumed, and log it."""
    logger.info(sentence)
    Console().print(sentence, markup=False, highlight=False, soft_wrap=True)


def print_error(error: Exception | str) -> None:
    """Print an error to the error stream, in one line."""
    Console(stderr=True, soft_wrap=True).print(f"error: {error}", markup=False, highlight=False)


def quieten_libraries() -> None:
    """Keep transformers and the hub from printing bars and messages, and PyTorch from a warning of every WavLM."""
    warnings.filterwarnings("ignore", message="Support for mismatched key_padding_mask and attn_mask")
    # Set before transformers is imported, which is why that happens here and not above.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
