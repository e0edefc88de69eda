"""The precision of a training, and whether the processor computes rightly in it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsewav.errors import UserError
from sparsewav.progress import print_warning

FRAMES = 50
"""Outputs of each module that are compared."""
UNLIKE = 0.05
"""Difference of a module's results in two precisions, relative to their norm, that rounding does not explain. That of
bfloat16 is some thousandths."""


def choose_precision(
    name: str, model: nn.Module, frozen: Sequence[nn.Module] = (), *, group: str = "training", quietly: bool = False
) -> str:
    """Turn ``auto`` into bfloat16 where the device has instructions for it that are right, and else into float32.

    A processor without such instructions emulates them, ten to twenty times slower than float32. Some compute a
    convolution of few channels wrongly (:func:`wrong_in_bfloat16`), without an error; of that a warning tells.

    Args:
        name: The option ``precision`` of a group.
        model: What is trained, on its device.
        frozen: What the loss is computed with besides, such as a teacher.
        group: The group, for messages.
        quietly: Leave out the warning.

    Raises:
        UserError: float16 is asked for on a CPU, whose autocast does not support it, or bfloat16 where it is wrong.
    """
    device = next(model.parameters()).device
    if name == "float16" and device.type == "cpu":
        raise UserError(f"{group}.precision=float16 wants a GPU; choose {group}.precision=auto")
    if name in ("float32", "float16"):
        return name
    if name == "auto" and not _has_bfloat16(device):
        return "float32"
    wrong = next(filter(None, map(wrong_in_bfloat16, (model, *frozen))), None)
    if wrong is None:
        return "bfloat16"
    fault = f"this machine computes {wrong} wrongly in bfloat16"
    if name == "bfloat16":
        raise UserError(f"{fault}; choose {group}.precision=float32")
    if not quietly:
        print_warning(f"{fault}; training in float32")
    return "float32"


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # older PyTorch: unknown
    return any(capabilities.get(key) for key in ("avx512_bf16", "amx_bf16", "bf16"))


def wrong_in_bfloat16(model: nn.Module) -> str | None:
    """Find a matrix or convolution of which output or gradients differ in bfloat16 from those in float32.

    Each is tried on noise, one of every shape. PyTorch 2.13 gives garbage on processors with AMX for some convolutions
    of few channels, among them the positional one of the demo model, whose groups have 12.

    Returns:
        The name of the first such module; None if all are right.
    """
    tried: set[Any] = set()
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv1d) or not module.weight.numel():
            continue
        kind = repr(module)
        if kind not in tried:
            tried.add(kind)
            expected, found = _results(module, enabled=False), _results(module, enabled=True)
            pairs = zip(expected, found, strict=True)
            if not all((one - other).norm() <= UNLIKE * one.norm() for one, other in pairs):
                return name
    return None


def _results(module: nn.Linear | nn.Conv1d, *, enabled: bool) -> list[Tensor]:
    """Give the output of a module of this shape for noise, and the gradients of input and weight."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(module.weight.device)

    with torch.inference_mode(False), torch.enable_grad():
        weight = noise(*module.weight.shape).requires_grad_()
        if isinstance(module, nn.Conv1d):
            reach = module.dilation[0] * (module.kernel_size[0] - 1)
            read = noise(2, module.in_channels, (FRAMES - 1) * module.stride[0] + reach + 1).requires_grad_()
        else:
            read = noise(2, FRAMES, module.in_features).requires_grad_()
        with torch.autocast(read.device.type, torch.bfloat16, enabled=enabled):
            if isinstance(module, nn.Conv1d):
                output = nn.functional.conv1d(read, weight, None, module.stride, 0, module.dilation, module.groups)
            else:
                output = nn.functional.linear(read, weight)
        gradients = torch.autograd.grad(output.float(), (read, weight), noise(*output.shape))
    return [output.detach().float(), *(gradient.float() for gradient in gradients)]
