"""Several processes that prune one model together: what the engine needs of :mod:`torch.distributed`.

Every process holds the same model and calls the same functions with the same arguments; inside, each works on its share
and what it found is exchanged, so that all end with the same result. Without a process group there is one process, and
nothing here does anything.
"""

import io
import pickle
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from sparsewav.errors import UserError

T = TypeVar("T")


class ProcessFailure(RuntimeError):
    """One of the processes failed, and not by a fault of the user's; raised in all of them."""


def world() -> int:
    """How many processes there are."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """The number of this one, from 0."""
    return distributed.get_rank() if world() > 1 else 0


def share(items: Iterable[T]) -> Iterator[tuple[int, T]]:
    """Every ``world()``-th item, for this process, with its place among all; the others are not read if need not be."""
    if world() > 1 and isinstance(items, Sequence):
        yield from ((index, items[index]) for index in range(rank(), len(items), world()))
    else:
        yield from ((index, item) for index, item in enumerate(items) if index % world() == rank())


def deal(costs: Sequence[float]) -> list[int]:
    """Give each piece of work to a process, the dearest first, always to the one that has the least to do.

    Args:
        costs: of the pieces, in any unit.

    Returns:
        For every piece the number of its process; the same in all processes.
    """
    loads = [0.0] * world()
    owners = [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        owners[index] = loads.index(min(loads))
        loads[owners[index]] += costs[index]
    return owners


@contextmanager
def together() -> Iterator[None]:
    """Wait at the end of a block for the other processes; an error that one of them met there is raised in all.

    Raises:
        UserError: what the first process that failed raised.
        ProcessFailure: the same, when it was another error.
    """
    if world() == 1:
        yield
        return
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    told = None if failure is None else (isinstance(failure, UserError), f"{type(failure).__name__}: {failure}")
    for process, item in enumerate(gather(told)):
        if item is not None:
            by_user, message = item
            if by_user:
                raise UserError(message.partition(": ")[2]) from failure
            raise ProcessFailure(f"in process {process} of {world()}: {message}") from failure


def gather(value: T) -> list[T]:
    """What every process gives, by its number; plain objects without large tensors."""
    if world() == 1:
        return [value]
    values: list[Any] = [None] * world()
    distributed.all_gather_object(values, value)
    return values


def add_up(tensor: Tensor) -> None:
    """Put in place of a tensor, whose shape is the same in all processes, the sum over them."""
    if world() > 1:
        distributed.all_reduce(tensor)


def broadcast(value: T, source: int = 0) -> T:
    """Give every process what one of them has; the value that the others pass does not matter.

    Args:
        value: any object that can be pickled; its tensors travel apart from it, from GPU to GPU where they lie there,
            and arrive on the receiving process's own device of the same type.
        source: number of the process that has it.
    """
    if world() == 1:
        return value
    tensors: list[Tensor] = []
    message: list[Any] = [None]
    if rank() == source:
        content = io.BytesIO()
        _Pickler(content, tensors).dump(value)
        message = [(content.getvalue(), [(tensor.shape, tensor.dtype, tensor.device.type) for tensor in tensors])]
    distributed.broadcast_object_list(message, src=source)
    content, descriptions = message[0]
    if rank() != source:
        # A bare "cuda" is the process's current GPU.
        tensors = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype, device in descriptions]
    for tensor in tensors:
        if tensor.numel():  # as bytes, because not every backend knows every type
            distributed.broadcast(tensor.flatten().view(torch.uint8), src=source)
    return value if rank() == source else _Unpickler(io.BytesIO(content), tensors).load()


class _Pickler(pickle.Pickler):
    """Leaves a number in place of every tensor."""

    def __init__(self, file: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_id(self, value: Any) -> int | None:
        if not isinstance(value, Tensor):
            return None
        self._tensors.append(value.detach().contiguous())
        return len(self._tensors) - 1


class _Unpickler(pickle.Unpickler):
    """Puts the tensors back."""

    def __init__(self, file: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, number: int) -> Tensor:
        return self._tensors[number]
