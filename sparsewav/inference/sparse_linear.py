"""Linear modules with a sparse weight."""

from typing import Any

import torch
from torch import Tensor, nn

from sparsewav.errors import UserError
from sparsewav.inference.kernel import MAX_COLUMNS, multiply


class SparseLinear(nn.Module):
    """A :class:`torch.nn.Linear` that stores and multiplies nonzero weights only, for inference on the CPU.

    Its ``state_dict`` has the dense weight, so that a model with it is saved as an ordinary checkpoint.

    Args:
        linear: The dense module, whose bias is shared.
        width: Columns in a block of the kernel's layout, or None for PyTorch's CSR product.

    Raises:
        UserError: The matrix has more columns or nonzeros than the layout can number.
    """

    offsets: Tensor
    columns: Tensor
    values: Tensor

    def __init__(self, linear: nn.Linear, width: int | None) -> None:
        super().__init__()
        weight = linear.weight.detach()
        self.out_features, self.in_features = weight.shape
        self.width = width
        self.bias = linear.bias
        cols = self.in_features
        if width is not None and cols > MAX_COLUMNS:
            raise UserError(
                f"the kernel numbers {MAX_COLUMNS} columns, and the matrix has {cols}; take width=None, PyTorch's CSR "
                "product"
            )
        blocks = [weight] if width is None else list(weight.split(width, dim=1))
        counts = torch.stack([(block != 0).sum(1) for block in blocks]).flatten()
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        if offsets[-1] > torch.iinfo(torch.int32).max:
            raise UserError(
                f"a sparse product numbers 2³¹ - 1 weights, and {int(offsets[-1])} are not zero; keep it dense"
            )
        columns = torch.cat(
            [(block != 0).nonzero()[:, 1] + index * (width or cols) for index, block in enumerate(blocks)]
        )
        self.register_buffer("offsets", offsets.to(torch.int32), persistent=False)
        narrow = torch.int32 if width is None else torch.int16  # the kernel takes them as unsigned
        self.register_buffer("columns", columns.to(narrow), persistent=False)
        self.register_buffer("values", torch.cat([block[block != 0] for block in blocks]), persistent=False)
        self.train(linear.training)

    @property
    def nonzeros(self) -> int:
        """Number of stored weights."""
        return len(self.values)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features), float32.

        Raises:
            UserError: The module or the input has another device or precision.
        """
        for tensor, what in ((self.values, "model"), (inputs, "input")):
            if tensor.device.type != "cpu" or tensor.dtype != torch.float32:
                raise UserError(
                    f"an accelerated model computes in float32 on the CPU, and the {what} is {tensor.dtype} on "
                    f"{tensor.device}; move the model before sparsewav.accelerate, not after it"
                )
        return _Product.apply(inputs, self)

    def product(self, inputs: Tensor) -> Tensor:
        """Map (frames, in_features) to (frames, out_features)."""
        if self.width is not None:
            arrays = (self.offsets, self.columns, self.values, self.bias)
            return multiply(inputs.contiguous(), self.out_features, self.width, *arrays)
        outputs = (self._csr() @ inputs.T.contiguous()).T.contiguous()
        return outputs if self.bias is None else outputs.add_(self.bias)

    def dense_weight(self) -> Tensor:
        """Give the weight, (out_features, in_features), bit for bit except for the sign of zeros."""
        rows, cols = self.out_features, self.in_features
        width = self.width or cols
        blocks = -(-cols // width)
        counts = self.offsets.diff().to(torch.int64)
        row = torch.arange(rows).repeat(blocks).repeat_interleave(counts)
        weight = self.values.new_zeros(rows, cols)
        weight[row, self.columns.to(torch.int64) & 0xFFFF if self.width else self.columns.to(torch.int64)] = self.values
        return weight

    def _csr(self) -> Tensor:
        shape = (self.out_features, self.in_features)
        return torch.sparse_csr_tensor(self.offsets, self.columns, self.values, shape, check_invariants=False)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.dense_weight()

    def _load_from_state_dict(self, *arguments: Any) -> None:
        raise UserError("an accelerated model takes no other weights; load them before sparsewav.accelerate")

    def extra_repr(self) -> str:
        share = 1 - self.nonzeros / (self.in_features * self.out_features)
        return f"in_features={self.in_features}, out_features={self.out_features}, sparsity={share:.4f}"


class _Product(torch.autograd.Function):
    """The product, which raises an error in the backward pass instead of dropping the gradient silently."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, linear: SparseLinear) -> Tensor:
        outputs = linear.product(inputs.detach().reshape(-1, linear.in_features))
        return outputs.view(*inputs.shape[:-1], linear.out_features)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        raise UserError("an accelerated model cannot be trained; train it before sparsewav.accelerate")
