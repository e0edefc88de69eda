"""The command line that the benchmarks of several parts share."""

import argparse
import inspect
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas
import torch
from rich.console import Console

from sparsewav.files import write_file
from sparsewav.pipeline.run_folder import device_name

MACHINE = ("machine", "threads", "versions")
"""Columns that say where a row was measured."""


@dataclass(frozen=True)
class Part:
    """One part of a benchmark.

    Attributes:
        measure: Takes the parsed options and returns a row a measurement. The first line of its docstring describes
            the part in ``--help``.
        show: Takes the rows and the path of their CSV file, writes what belongs beside it, and returns the text to
            print.
    """

    measure: Callable[[argparse.Namespace], pandas.DataFrame]
    show: Callable[[pandas.DataFrame, Path], str]


def benchmark_parser(name: str, description: str, parts: dict[str, Part], example: str) -> argparse.ArgumentParser:
    """The parser of ``python -m experiments.bench.<name>`` with the options that all benchmarks have.

    Args:
        name: The module's name.
        description: What the benchmark measures, in one sentence.
        parts: Its parts by name.
        example: Arguments of a command worth copying.
    """
    described = [f"  {part:<13} {(inspect.getdoc(parts[part].measure) or '').splitlines()[0]}" for part in parts]
    parser = argparse.ArgumentParser(
        prog=f"python -m experiments.bench.{name}",
        description=f"{description} Writes CSV files, and plots beside some of them.",
        epilog="\n".join(["parts:", *described, "", "example:", f"  python -m experiments.bench.{name} {example}"]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def known(part: str) -> str:
        if part not in parts:
            raise argparse.ArgumentTypeError(f"{part} is none of {', '.join(parts)}")
        return part

    help_text = f"{', '.join(parts)} (default all)"
    parser.add_argument("parts", nargs="*", type=known, default=list(parts), metavar="part", help=help_text)
    parser.add_argument("--rounds", type=int, default=3, help="how often each contestant runs (default 3)")
    parser.add_argument("--output", type=Path, default=Path("outputs/bench"), help="folder (default outputs/bench)")
    return parser


def run_parts(
    parts: dict[str, Part],
    arguments: argparse.Namespace,
    *,
    device: str = "cpu",
    prefix: str = "",
    keys: Sequence[str] = (),
) -> int:
    """Measure the parts asked for, write ``<prefix><part>.csv`` of each and print what it shows.

    Args:
        parts: The benchmark's parts by name.
        arguments: What :func:`benchmark_parser` parsed.
        device: The device to name in the rows.
        prefix: Beginning of the files' names.
        keys: Columns that identify a measurement. With them, rows of earlier runs stay in the file unless they are
            measured again.

    Returns:
        The exit code.
    """
    console = Console(width=160)
    machine = device_name(torch.device(device))
    versions = f"Python {platform.python_version()}, PyTorch {torch.__version__}"
    console.print(f"{machine}, {torch.get_num_threads()} threads, {versions}", highlight=False)
    for name in arguments.parts:
        console.rule(name)
        path = arguments.output / f"{prefix}{name}.csv"
        if keys and path.is_file():
            _check_origin(path, {"machine": machine, "versions": versions})
        table = parts[name].measure(arguments)
        identifying = [key for key in keys if key in table]
        table["machine"], table["versions"] = machine, versions
        if "threads" not in table:
            table["threads"] = torch.get_num_threads()
        table = merged(path, table, identifying)
        with write_file(path) as temporary:
            table.to_csv(temporary, index=False)
        console.print(parts[name].show(table, path), highlight=False)
        console.print(str(path), highlight=False)
    return 0


def _check_origin(path: Path, here: dict[str, str]) -> None:
    """Stop before anything is measured if a file has rows of another machine, which medians would mix with new ones."""
    old = pandas.read_csv(path)
    for key, value in here.items():
        others = set(old[key].astype(str)) - {value}
        if others:
            raise SystemExit(
                f"error: {path} has rows measured on {', '.join(sorted(others))}, and this is {value}; choose another "
                "folder with --output"
            )


def merged(path: Path, table: pandas.DataFrame, keys: Sequence[str]) -> pandas.DataFrame:
    """The rows of a CSV file with those of the same keys replaced by new ones; the new ones alone without keys."""
    if not keys or not path.is_file():
        return table
    old = pandas.read_csv(path)
    new = set(map(tuple, table[list(keys)].to_numpy().tolist()))
    kept = [tuple(row) not in new for row in old[list(keys)].to_numpy().tolist()]
    return pandas.concat([old[kept], table], ignore_index=True)
