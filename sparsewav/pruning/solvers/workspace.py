"""Memory that the solver keeps from one matrix to the next.

On a CPU, memory of tens of megabytes goes back to the system when it is freed, and getting it again takes as long as
what the solver does with it.
"""

import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

_kept = threading.local()


def workspace(purpose: str, shape: Sequence[int], like: Tensor) -> Tensor:
    """Give a tensor without a value in it, whose memory the next call for the same purpose gives again.

    Args:
        purpose: what it is for; every thread has one memory for each purpose, as large as the largest asked for.
        shape: of the tensor.
        like: has its dtype and device. On a GPU PyTorch keeps freed memory itself: the tensor is a new one there.
    """
    if like.device.type != "cpu":
        return like.new_empty(shape)
    size = math.prod(shape)
    memory: Tensor | None = getattr(_kept, purpose, None)
    if memory is None or memory.dtype != like.dtype or len(memory) < size:
        memory = torch.empty(size, dtype=like.dtype)
        setattr(_kept, purpose, memory)
    return memory[:size].view(*shape)
