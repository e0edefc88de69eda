"""How long a model and its parts take on this machine: the table that a budget of seconds is shared by.

Three kinds of models are timed in turns, on noise: the whole dense model; the same without any heads and units, and,
where channels may go, with one channel a convolution, too; and probes (:mod:`~sparsewav.inference.shapes`), which are a
few layers alone with 0, 1, ... of their heads and no units, or some numbers of units and no heads, or the convolutions
with some share of their channels before a layer with neither. What a probe takes beyond the smallest, over its layers,
is what these parts of a layer, or of the front end, take. Between the numbers that were timed it is interpolated
linearly, after an isotonic regression, because noise may let more parts take less time.

The parts alone do not add up to the whole: caches are warmer in a probe. So the times of heads and units are scaled by
one factor, with which those of all parts are the difference between the first two whole models, and those of channels
by another, from the last two. The table is then exact for the whole models, and approximate in between, of which the
choice is timed (:mod:`~sparsewav.pruning.allocation.latency`).
"""

import json
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from transformers import PreTrainedModel

from sparsewav.cache import cached_folder
from sparsewav.errors import UserError
from sparsewav.inference.kernel import processor_name
from sparsewav.inference.shapes import THIN, Shape, probe_of, with_parts
from sparsewav.inference.speedup import (
    CPU,
    EXPORTED_AS,
    Run,
    audio_of_length,
    check_runtime,
    prepared,
)
from sparsewav.inference.timing import check_seconds, rounds_in_turns, rounds_within
from sparsewav.progress import print_warning
from sparsewav.pruning.allocation.latency import LatencyTable
from sparsewav.pruning.encoder import has_head, whatever_modes
from sparsewav.pruning.families import Kind
from sparsewav.pruning.hessian import Progress
from sparsewav.pruning.structure import FrontEnd, Structure, front_end, structures
from sparsewav.settings.sparsity import Structured

VERSION = 1
"""Of the measurement; another one makes what was measured before another's."""

RECORD = "latency.json"

LAYERS = 4
"""Of a probe, or as many as the model has if they are fewer."""

POINTS: dict[Kind, int] = {"heads": 8, "units": 10, "channels": 10}
POINTS_EXPORTED: dict[Kind, int] = {"heads": 5, "units": 7, "channels": 6}
"""About how many numbers of parts are timed, none and all of them included; fewer where each has to be exported."""

SECONDS, LEAST, MOST = 30.0, 5, 40
"""All models are timed about so many seconds for every length of audio, and in so many rounds at least and at most."""


@dataclass(frozen=True, eq=False)
class Timed:
    """What a run that is to make a model faster knows of it.

    Attributes:
        dense: The shape of the dense model.
        table: How long it and its parts take.
        source: The file that this was read from; None where it was measured for this run.
    """

    dense: Shape
    table: LatencyTable
    source: Path | None


@dataclass(frozen=True)
class Measurement:
    """What was timed, each time the median over the rounds for every length of audio.

    Attributes:
        dense: Seconds of the whole model.
        rest: Seconds of the whole model without heads and units.
        thin: Those of the same with one channel a convolution; empty where channels do not go.
        counts: By kind, the numbers of parts in a layer that were timed, from 0 to the most that a layer has. Those of
            channels are of the widest convolution, from 1.
        probes: By kind, the seconds of a probe with each number, and for each a number for every length.
        layers: The layers of a probe.
        rounds: The rounds for every length of audio.
    """

    dense: tuple[float, ...]
    rest: tuple[float, ...]
    thin: tuple[float, ...]
    counts: dict[Kind, tuple[int, ...]]
    probes: dict[Kind, tuple[tuple[float, ...], ...]]
    layers: int
    rounds: tuple[int, ...]


def grid(most: int, points: int) -> tuple[int, ...]:
    """Give about so many numbers from 0 to ``most``, closer to one another where they are small."""
    if most < points:
        return tuple(range(most + 1))
    fractions = [0.0, 1 / 16, *(index / (points - 2) for index in range(1, points - 1))]
    return tuple(sorted({round(fraction * most) for fraction in fractions}))


def grids(model: PreTrainedModel, asked: Structured) -> dict[Kind, tuple[int, ...]]:
    """Give the numbers of parts that are timed for a model, by kind."""
    points = POINTS_EXPORTED if asked.runtime in EXPORTED_AS else POINTS
    most: dict[Kind, int] = {}
    for structure in structures(model):
        most[structure.kind] = max(most.get(structure.kind, 0), structure.count)
    found = {kind: grid(count, points[kind]) for kind, count in most.items()}
    if "channels" in asked.parts:
        found["channels"] = tuple(sorted({max(one, 1) for one in grid(front_end(model).count, points["channels"])}))
    return found


@torch.no_grad()
def measure(model: PreTrainedModel, asked: Structured, progress: Progress | None = None) -> Measurement:
    """Time a dense model and its parts in the runtime and on the lengths of audio that were asked for.

    Args:
        model: The model, of which the shape alone matters.
        asked: Says what to time.
        progress: Called with the steps done and all steps, after every model that is prepared and every round.

    Raises:
        UserError: The runtime does not run one of the models.
    """
    counts, dense = grids(model, asked), Shape.of(model).build()
    layers = min(LAYERS, model.config.num_hidden_layers)
    none = {one.name: 0 for one in structures(dense)}
    bare = [none, *([none | {front_end(dense).name: 1}] if "channels" in counts else [])]
    points: list[tuple[Kind | None, int]] = [(None, 0)]  # neither heads nor units, which both kinds share
    points += [(kind, count) for kind, own in counts.items() for count in own if count]
    rounds, steps, done = [LEAST] * len(asked.audio_seconds), 1 + len(bare) + len(points), 0

    def advance() -> None:
        nonlocal done
        done += 1
        if progress:
            progress(min(done, steps), steps)

    with tempfile.TemporaryDirectory(prefix="sparsewav-") as folder, whatever_modes(CPU):

        def run_of(model: PreTrainedModel) -> Run:
            run = prepared(asked.runtime, model, Path(tempfile.mkdtemp(dir=folder)))
            advance()
            return run

        runs = [run_of(dense), *(run_of(with_parts(dense, kept)) for kept in bare)]
        for kind, count in points:
            if kind == "channels":
                probe = probe_of(dense, 1, conv_dim=front_end(dense).kept(count))
            else:
                heads, units = (count if kind == own else 0 for own in ("heads", "units"))
                probe = probe_of(dense, layers, heads, units)
            runs.append(run_of(probe))
        rows = []
        with torch.inference_mode():
            for index, seconds in enumerate(asked.audio_seconds):
                contestants = [partial(run, audio_of_length(dense, seconds)) for run in runs]
                rounds[index] = rounds_within(SECONDS, contestants, LEAST, MOST)
                steps = done + sum(rounds[index:]) + len(rounds[index:])
                rows.append(
                    [
                        statistics.median(times)
                        for times in rounds_in_turns(rounds[index], contestants, advance, shuffled=True)
                    ]
                )
    columns = list(zip(*rows, strict=True))
    timed = dict(zip(points, columns[1 + len(bare) :], strict=True))
    probes = {kind: tuple(timed[kind if count else None, count] for count in own) for kind, own in counts.items()}
    thin = columns[2] if len(bare) > 1 else ()
    return Measurement(columns[0], columns[1], thin, counts, probes, layers, tuple(rounds))


def table_of(found: Measurement, parts: Sequence[Structure | FrontEnd], conditions: str) -> LatencyTable:
    """Make the table of a model with these structures from what was timed; the module says how.

    Raises:
        UserError: The parts take no time that can be told from noise.
    """
    whole, rest, thin = (round(1e9 * sum(seconds)) for seconds in (found.dense, found.rest, found.thin))
    raw: dict[Kind, np.ndarray] = {}
    for kind, counts in found.counts.items():
        seconds = np.array(found.probes[kind]).sum(axis=1)
        smooth = isotonic((seconds - seconds[0]) / (1 if kind == "channels" else found.layers))
        raw[kind] = np.interp(np.arange(counts[-1] + 1), counts, smooth - smooth[0])
    together = sum(float(raw[one.kind][one.count]) for one in parts if isinstance(one, Structure))
    if not (whole > rest and together > 0):
        raise UserError(
            f"the heads and units take no time that can be told from noise: the whole model takes {whole / 1e9:.4f} s, "
            f"and without them {rest / 1e9:.4f} s ({conditions}); give longer sparsity.audio_seconds, or sparsity.macs "
            "in place of sparsity.speedup"
        )
    scales = dict.fromkeys(raw, (whole - rest) / together)
    if "channels" in raw:
        alone = float(raw["channels"][-1])
        if not (rest > thin and alone > 0):
            raise UserError(
                f"the channels take no time that can be told from noise: the model without heads and units takes "
                f"{rest / 1e9:.4f} s, and with one channel a convolution {thin / 1e9:.4f} s ({conditions}); leave "
                "channels out of sparsity.parts, or give longer sparsity.audio_seconds"
            )
        scales["channels"] = (rest - thin) / alone
    scaled: dict[Kind, Any] = {kind: np.rint(scales[kind] * own).astype(np.int64) for kind, own in raw.items()}
    rest = whole - sum(int(scaled[one.kind][one.count]) for one in parts)  # what rounding to nanoseconds leaves
    return LatencyTable(whole, scaled, rest, conditions)


def isotonic(values: Float[np.ndarray, " points"]) -> Float[np.ndarray, " points"]:
    """Give the sequence that never falls and is nearest in squares, by pooling neighbours that fall."""
    pools: list[tuple[float, int]] = []
    for value in values:
        pools.append((float(value), 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (mean, size), (before, more) = pools.pop(), pools.pop()
            pools.append(((mean * size + before * more) / (size + more), size + more))
    return np.repeat([mean for mean, _ in pools], [size for _, size in pools])


def conditions_of(asked: Structured, threads: int) -> str:
    """Say what is timed and how, e.g. ``pytorch, 1 thread, 5 and 20 s of audio``."""
    lengths = " and ".join(f"{seconds:g}" for seconds in asked.audio_seconds)
    return f"{asked.runtime}, {threads} thread{'s' * (threads != 1)}, {lengths} s of audio"


def latency_table(
    model: PreTrainedModel, asked: Structured, *, enabled: bool = True, progress: Progress | None = None
) -> tuple[LatencyTable, Path | None]:
    """Measure how long a model and its parts take, or read what was measured on this machine before.

    Args:
        model: The dense model.
        asked: The runtime and the lengths of audio.
        enabled: Read what the cache has; otherwise it is measured again.
        progress: As of :func:`measure`.

    Returns:
        The table, and the file that it was read from; None where it was measured now.

    Raises:
        UserError: The model cannot be cut, the runtime is not installed or does not run it, or the parts take no time
            that can be told from noise.
    """
    parts: list[Structure | FrontEnd] = [*structures(model)]
    parts += [front_end(model)] if "channels" in asked.parts else []
    threads = torch.get_num_threads()
    check_runtime(asked, model)
    identity = _identity(model, asked, threads)
    # A record that has other numbers than it may is no damage of the file: somebody has written it.
    for trusted in (enabled, False):
        made: list[Measurement] = []
        folder, found = cached_folder(
            "latency",
            identity,
            lambda place, made=made: _write(place, measure(model, asked, progress), made),  # type: ignore[misc]
            enabled=trusted,
        )
        try:
            measured = (
                made[0] if made else read_measurement(folder / RECORD, len(asked.audio_seconds), grids(model, asked))
            )
        except ValueError as error:
            print_warning(f"{folder / RECORD} holds no latencies of this model ({error}); they are measured again")
            continue
        return table_of(measured, parts, conditions_of(asked, threads)), folder / RECORD if found else None
    raise AssertionError("what was measured just now needs no reading")


def _identity(model: PreTrainedModel, asked: Structured, threads: int) -> dict[str, Any]:
    """Give all that latencies depend on."""
    config = model.config.to_dict()
    unimportant = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")
    libraries = {"onnx_int8": ("onnx", "onnxruntime"), "openvino_int8": ("onnx", "openvino", "nncf")}
    return {
        "version": VERSION,
        "processor": processor_name(),
        "threads": threads,
        "runtime": asked.runtime,
        "versions": {name: version(name) for name in ("torch", "transformers", *libraries.get(asked.runtime, ()))},
        "head": has_head(model),
        "config": json.loads(
            json.dumps({key: value for key, value in config.items() if key not in unimportant}, default=str)
        ),
        "attention": model.config._attn_implementation,
        "audio_seconds": [float(seconds) for seconds in asked.audio_seconds],
        "batch": 1,
        "grids": grids(model, asked),
        "probes": [LAYERS, THIN, LEAST, MOST, SECONDS],
    }


def _write(folder: Path, measured: Measurement, made: list[Measurement]) -> None:
    (folder / RECORD).write_text(json.dumps(asdict(measured), indent=1) + "\n", encoding="utf-8")
    made.append(measured)


def read_measurement(path: Path, lengths: int, expected: Mapping[Kind, Sequence[int]]) -> Measurement:
    """Read what :func:`measure` found for so many lengths of audio and these numbers of parts.

    Raises:
        ValueError: The file cannot be read, or holds something else.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        counts = {kind: tuple(own) for kind, own in record["counts"].items()}
        if counts != {kind: tuple(own) for kind, own in expected.items()}:
            raise ValueError(f"it is of {counts} parts")
        probes = {kind: tuple(check_seconds(row, lengths) for row in rows) for kind, rows in record["probes"].items()}
        if {kind: len(rows) for kind, rows in probes.items()} != {kind: len(own) for kind, own in counts.items()}:
            raise ValueError("it has not a time for every number of parts")
        layers, rounds = record["layers"], tuple(record["rounds"])
        if not all(type(number) is int and number > 0 for number in (layers, *rounds)) or len(rounds) != lengths:
            raise ValueError(f"it is of {layers} layers and {rounds} rounds")
        dense, rest = (check_seconds(record[key], lengths) for key in ("dense", "rest"))
        thin = check_seconds(record["thin"], lengths if "channels" in counts else 0)
        return Measurement(dense, rest, thin, counts, probes, layers, rounds)
    # a file that is nested a thousand times exceeds the recursion limit
    except (OSError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
