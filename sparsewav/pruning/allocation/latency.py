"""A budget of seconds: what heads, units and channels take of the time of a whole model, and what a choice takes.

How long parts take is measured by the caller (:mod:`sparsewav.inference.latency`), because the engine knows no runtime.
It hands over a :class:`LatencyTable` of plain numbers, and a function that times a model of any numbers of parts. The
time of a whole is not exactly the sum of the times of its parts, so what was chosen by the table is timed before it is
solved, and chosen again where it misses what was asked for.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Int

from sparsewav.errors import UserError
from sparsewav.pruning.families import Kind
from sparsewav.pruning.structure import FrontEnd, Structure

TOLERANCE = 0.03
"""How far the measured time may be from what was asked for, relative to that, before the choice is made again."""

TRIES = 4
"""How often a choice is timed at most."""

TimeShape = Callable[[Mapping[str, int]], float]
"""Measures the seconds of a model with so many parts of every structure, by name, over those of the dense model."""


@dataclass(frozen=True, eq=False)
class LatencyTable:
    """How long a dense model and its parts take, in whole nanoseconds.

    Attributes:
        total: What the whole dense model takes.
        parts: By kind, what the parts of one structure take together, with 0, 1, ... of them; never less with more of
            them, and 0 with none. Channels are those of the widest convolution, and take 0 with one, too, as one stays.
            A kind that a table lacks cannot be removed within it.
        rest: What the model takes without any of these parts.
        conditions: What was timed and how, for sentences, e.g. ``pytorch, 1 thread, 5 and 20 s of audio``.
    """

    total: int
    parts: Mapping[Kind, Int[np.ndarray, " _counts"]]
    rest: int
    conditions: str

    def __post_init__(self) -> None:
        for kind, own in self.parts.items():
            if not len(own) or own[0] != 0 or (np.diff(own) < 0).any():
                raise ValueError(f"the seconds of {kind} begin at 0 and never become fewer, not {own.tolist()}")
        if self.total <= 0 or self.rest <= 0:
            raise ValueError(f"a model takes more than {self.total} ns, and {self.rest} ns without its parts")

    def record(self) -> dict[str, Any]:
        """Give the table as JSON can hold it."""
        return asdict(self) | {"parts": {kind: own.tolist() for kind, own in self.parts.items()}}

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> "LatencyTable":
        """Give the table that :meth:`record` made a record of."""
        parts = {kind: np.array(own, dtype=np.int64) for kind, own in record["parts"].items()}
        return cls(record["total"], parts, record["rest"], record["conditions"])


def latency_amounts(
    structures: Iterable[Structure | FrontEnd], table: LatencyTable
) -> dict[str, Int[np.ndarray, " _counts"]]:
    """Give what every structure takes with 0, 1, ... of its parts.

    Returns:
        An array by the name of the matrix that reads the parts; of the front end by its own.

    Raises:
        UserError: A structure has more parts than those of its kind in the table, which is that of another model.
    """
    amounts = {}
    for structure in structures:
        own = table.parts.get(structure.kind, np.zeros(0, dtype=np.int64))
        if len(own) <= structure.count:
            raise UserError(
                f"{structure.name} has {structure.count} {structure.kind}, and the latencies are of a model with "
                f"{max(len(own) - 1, 0)}; measure them on this model"
            )
        name = structure.name if isinstance(structure, FrontEnd) else structure.reader.name
        amounts[name] = own[: structure.count + 1]
    return amounts
