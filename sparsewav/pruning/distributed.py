"""Data parallelism: what the engine needs of :mod:`torch.distributed` to prune one model in several processes.

Every process holds the same model and calls the same functions with the same arguments; inside, each works on its share
and the results are exchanged, so that all end with the same result. Without a process group there is one process, and
the functions of this module have no effect.
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
    """One of the processes failed with another error than a :class:`UserError`; raised in all of them."""


def world() -> int:
    """Give the number of processes."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """Give the rank of this process, from 0."""
    return distributed.get_rank() if world() > 1 else 0


def share(items: Iterable[T]) -> Iterator[tuple[int, T]]:
    """Yield every ``world()``-th item, this process's share, with its index; the others of a sequence are not read."""
    if world() > 1 and isinstance(items, Sequence):
        yield from ((index, items[index]) for index in range(rank(), len(items), world()))
    else:
        yield from ((index, item) for index, item in enumerate(items) if index % world() == rank())


def deal(costs: Sequence[float]) -> list[int]:
    """Assign pieces of work to processes, the most expensive first, always to the least loaded process.

    Args:
        costs: The cost of every piece, in any unit.

    Returns:
        The rank of every piece's process, the same in all processes.
    """
    loads = [0.0] * world()
    owners = [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        owners[index] = loads.index(min(loads))
        loads[owners[index]] += costs[index]
    return owners


@contextmanager
def together() -> Iterator[None]:
    """Synchronise the processes at the end of a block; an error in one of them is raised in all.

    Raises:
        UserError: A process failed with a ``UserError``; the message is that of the first process that failed.
        ProcessFailure: It failed with another error.
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
    """Give the values of all processes, by rank; meant for plain objects without large tensors."""
    if world() == 1:
        return [value]
    values: list[Any] = [None] * world()
    distributed.all_gather_object(values, value)
    return values


def add_up(tensor: Tensor) -> None:
    """Replace a tensor, which has the same shape in all processes, by its sum over them."""
    if world() > 1:
        distributed.all_reduce(tensor)


def broadcast(value: T, source: int = 0) -> T:
    """Give every process the value of one of them.

    Args:
        value: Any object that can be pickled; only the source's matters. Its tensors are sent separately, from GPU to
            GPU if they lie there, and arrive on the receiving process's own device of the same type.
        source: The rank of the process whose value is sent.
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
        # "cuda" without an index is the process's current GPU.
        tensors = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype, device in descriptions]
    for tensor in tensors:
        if tensor.numel():  # as bytes, because not every backend supports every dtype
            distributed.broadcast(tensor.flatten().view(torch.uint8), src=source)
    return value if rank() == source else _Unpickler(io.BytesIO(content), tensors).load()


class _Pickler(pickle.Pickler):
    """Replaces every tensor by a number."""

    def __init__(self, file: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_id(self, value: Any) -> int | None:
        if not isinstance(value, Tensor):
            return None
        self._tensors.append(value.detach().contiguous())
        return len(self._tensors) - 1


class _Unpickler(pickle.Unpickler):
    """Puts the tensors back in place of their numbers."""

    def __init__(self, file: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, number: int) -> Tensor:
        return self._tensors[number]
