"""What the console commands that Hydra does not start share: their options, and how they end with an error."""

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from sparsewav import __version__
from sparsewav.errors import UserError
from sparsewav.progress import print_error


def command_parser(name: str, description: str, epilog: str) -> argparse.ArgumentParser:
    """Make the parser of a command, which has ``--version``; the epilog is printed as it is written."""
    parser = argparse.ArgumentParser(
        prog=name, description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    return parser


def add_speech(parser: Any, default: str) -> None:
    """Add ``--data`` to a parser or a group of it: the speech that error rates are measured on.

    Args:
        parser: A parser or a group of one.
        default: What speech it is that is not named.
    """
    parser.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help=f"options of data, as of sparsewav (default: {default})",
    )


@contextmanager
def exit_on_user_error(interrupted: str | None = None) -> Iterator[None]:
    """Within the block, an error that the user can correct is printed as its sentence, and ends the command with 1.

    Args:
        interrupted: What is printed where the user interrupts the command; None leaves that to Python.
    """
    try:
        yield
    except UserError as error:
        print_error(error)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        if interrupted is None:
            raise
        raise SystemExit(f"interrupted; {interrupted}") from None


def end_without_reader() -> NoReturn:
    """End a command whose output nobody reads on, as behind ``| head``."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # where Python flushes at its end
    raise SystemExit(1) from None
