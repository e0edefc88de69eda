"""Memory that the solver keeps from one matrix to the next.

On a CPU, memory of tens of megabytes goes back to the operating system when it is freed, and allocating it again takes
as long as what the solver does with it.
"""

import math
import threading
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

_kept = threading.local()


def workspace(purpose: str, shape: Sequence[int], like: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Give an uninitialised tensor in memory that the next call for the same purpose reuses.

    Every thread has its own memory for each purpose, as large as the largest tensor asked for.

    Args:
        purpose: The name of the memory.
        shape: The tensor's shape.
        like: A tensor of the same dtype and device. On a GPU the tensor is always a new one, because PyTorch caches
            freed memory there itself.
    """
    if like.device.type != "cpu":
        return like.new_empty(shape)
    size = math.prod(shape)
    memory: Tensor | None = getattr(_kept, purpose, None)
    if memory is None or memory.dtype != like.dtype or len(memory) < size:
        memory = torch.empty(size, dtype=like.dtype)
        setattr(_kept, purpose, memory)
    return memory[:size].view(*shape)
