"""Output on the terminal: progress of stages and errors, without messages of libraries."""

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

logger = logging.getLogger(__name__)


@contextmanager
def stage(console: Console, description: str) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar, and the seconds at the end; yields a function to call with (steps done, steps)."""
    started = time.perf_counter()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    hidden = not console.is_terminal  # in a file or a pipe a bar would only leave blank lines
    with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
        task = progress.add_task(description, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
    seconds = time.perf_counter() - started
    logger.info("%s: %.2f s", description, seconds)
    console.print(f"[green]✓[/green] {description} [dim]{seconds:.1f} s[/dim]")


_collected: list[list[str]] = []


@contextmanager
def collect_warnings() -> Iterator[list[str]]:
    """Give a list that gets every sentence of :func:`print_warning` within the block."""
    _collected.append([])
    try:
        yield _collected[-1]
    finally:
        _collected.pop()


def print_warning(sentence: str) -> None:
    """Print a sentence that the user should know, log it, and give it to the record of the run."""
    logger.warning(sentence)
    for sentences in _collected:
        sentences.append(sentence)
    Console().print(f"! {sentence}", style="yellow", markup=False, highlight=False, soft_wrap=True)


def print_error(error: Exception | str) -> None:
    """Print an error to the error stream, in one line."""
    Console(stderr=True, soft_wrap=True).print(f"error: {error}", markup=False, highlight=False)


def quieten_libraries() -> None:
    """Keep transformers and the hub from printing bars and messages."""
    # Set before transformers is imported, which is why that happens here and not above.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
