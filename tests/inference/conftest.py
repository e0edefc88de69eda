"""What tests of sparse products share."""

import pytest

from sparsewav.inference import kernel


def _has_kernel() -> str:
    try:
        kernel.sparse_kernel()
    except kernel.NoKernel as error:
        return str(error)
    return ""


@pytest.fixture
def compiled() -> None:
    """Skip where the kernel cannot be built, and say why."""
    reason = _has_kernel()
    if reason:
        pytest.skip(f"no kernel: {reason}")
