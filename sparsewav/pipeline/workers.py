"""Runs in several processes that torchrun or Slurm started together.

The first process does the run: it alone evaluates, tunes, writes files and shows what it does. The others work for it
when it calls a function of the engine, and get what they need from it: weights, batches and settings.
"""

import os
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from sparsewav.data.batches import SpeechBatches
from sparsewav.errors import UserError
from sparsewav.pruning import distributed

T = TypeVar("T")

_END = "end"
"""Sent in place of an order when the run has ended."""

_with_gpu = 0
"""The number of processes that have a GPU."""

_LAUNCHER_VARIABLES = (
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT"),
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE"),
)

OF_THE_FIRST = ("progress", "time_shape")
"""Options that are functions, which the first process alone calls."""

TIMEOUT = timedelta(days=24)
"""The others wait so long while the first tunes; more milliseconds would not fit into 32 bits."""


def lead_or_work(main: Callable[[], T]) -> T | None:
    """Do ``main`` in the first of the processes, while the others work for it until it ends.

    The others never report a failure by themselves: it would make their launcher stop the first process, too, before
    that one has said what is wrong.

    Returns:
        What ``main`` returned, in the first process; None in the others.
    """
    _join()
    try:
        if distributed.rank() == 0:
            return main()
        _work()
        return None
    finally:
        if distributed.rank() == 0:
            with suppress(RuntimeError):  # a process that died cannot be told
                distributed.broadcast(_END)
        torch.distributed.destroy_process_group()


def in_all_processes(function: Callable[..., T], model: PreTrainedModel, batches: SpeechBatches, **options: Any) -> T:
    """Call a function of the engine in all processes, with the same model, batches and options.

    Args:
        function: It takes a model, batches and options.
        model: The first process's model; the others get its weights.
        batches: Each process reads them from files that it must find in the same place.
        options: The function's options, of which the others get all but :data:`OF_THE_FIRST`.

    Raises:
        UserError: The function raised one in any process, or there are fewer GPUs than processes.
    """
    if distributed.world() > 1:
        if model.device.type == "cuda" and _with_gpu < distributed.world():
            raise UserError(
                f"{distributed.world()} processes want a GPU each, and {_with_gpu} have one; start fewer processes, or "
                "choose device=cpu"
            )
        if model.device.index:
            raise UserError(f"device={model.device} is one GPU, and the processes take one each; choose device=auto")
        shared = {name: value for name, value in options.items() if name not in OF_THE_FIRST}
        distributed.broadcast((function, type(model), model.config, model.dtype, model.state_dict(), batches, shared))
        with distributed.together():  # the others make the model
            pass
    return function(model, batches, **options)


def _join() -> None:
    """Make the process group."""
    global _with_gpu
    local_rank = int(os.environ["LOCAL_RANK"])
    has_gpu = local_rank < torch.cuda.device_count()
    if has_gpu:
        torch.cuda.set_device(local_rank)
    # Each backend serves the tensors of its own device.
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT)
    # What this process starts, and Accelerate in it, must not take itself for a part of the group.
    for name in list(os.environ):
        if name in _LAUNCHER_VARIABLES or name.startswith("TORCHELASTIC_"):
            del os.environ[name]
    _with_gpu = sum(distributed.gather(has_gpu))


def _work() -> None:
    """Do what the first process asks for until it ends."""
    model: PreTrainedModel | None = None
    while True:
        order: Any = distributed.broadcast(None)
        if order == _END:
            return
        with suppress(UserError, distributed.ProcessFailure):  # raised in all processes; the first one reports it
            model = _do(order, model)
        del order  # or its tensors would stay while the first process tunes


def _do(order: Any, model: PreTrainedModel | None) -> PreTrainedModel:
    """Do what :func:`in_all_processes` asked for; takes and gives the model, which the next order can be for, too."""
    function, kind, config, dtype, state, batches, options = order
    with distributed.together():
        if not isinstance(model, kind) or (model.config.to_dict(), model.dtype) != (config.to_dict(), dtype):
            model = kind._from_config(config, dtype=dtype).eval()
        model.to(next(iter(state.values())).device)
        model.load_state_dict(state)
    function(model, batches, **options)
    return model
