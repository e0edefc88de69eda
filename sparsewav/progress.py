"""The display of a run's stages."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

logger = logging.getLogger(__name__)


@contextmanager
def stage(console: Console, description: str) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar, and a line with the seconds at the end; yields what to call with (steps done, steps)."""
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
