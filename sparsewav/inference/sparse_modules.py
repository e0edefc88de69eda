"""Linear modules and convolutions with a sparse weight."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sparsewav.errors import UserError
from sparsewav.inference.kernel import MAX_COLUMNS, convolve, multiply


class SparseModule(nn.Module, ABC):
    """A module that stores and multiplies nonzero weights only, for inference on the CPU.

    Its ``state_dict`` has the dense weight, so that a model with it is saved as an ordinary checkpoint.

    Args:
        dense: The dense module, whose bias is shared. Its weight has a row for every output, of any shape.
        width: Columns in a block of the kernel's layout, or None for the layout of PyTorch's CSR product.

    Raises:
        UserError: The matrix has more columns or nonzeros than the layout can number.
    """

    offsets: Tensor
    columns: Tensor
    values: Tensor

    def __init__(self, dense: nn.Linear | nn.Conv1d, width: int | None) -> None:
        super().__init__()
        self.shape = dense.weight.shape
        self.width = width
        self.bias = dense.bias
        weight = dense.weight.detach().flatten(1)
        self.rows, self.cols = weight.shape
        if width is not None and self.cols > MAX_COLUMNS:
            raise UserError(
                f"the kernel numbers {MAX_COLUMNS} columns, and the matrix has {self.cols}; take width=None, PyTorch's "
                "CSR product"
            )
        blocks = [weight] if width is None else list(weight.split(width, dim=1))
        counts = torch.stack([(block != 0).sum(1) for block in blocks]).flatten()
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        if offsets[-1] > torch.iinfo(torch.int32).max:
            raise UserError(
                f"a sparse product numbers 2³¹ - 1 weights, and {int(offsets[-1])} are not zero; keep it dense"
            )
        columns = torch.cat(
            [(block != 0).nonzero()[:, 1] + index * (width or self.cols) for index, block in enumerate(blocks)]
        )
        self.register_buffer("offsets", offsets.to(torch.int32), persistent=False)
        narrow = torch.int32 if width is None else torch.int16  # the kernel takes them as unsigned
        self.register_buffer("columns", columns.to(narrow), persistent=False)
        self.register_buffer("values", torch.cat([block[block != 0] for block in blocks]), persistent=False)
        self.train(dense.training)

    @property
    def nonzeros(self) -> int:
        """Number of stored weights."""
        return len(self.values)

    @property
    def weight(self) -> Float[Tensor, "rows ..."]:
        """A copy of the dense weight, for models that ask for its precision; what is written to it is lost."""
        return self.dense_weight()

    def forward(self, inputs: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Give what the dense module gives, in float32.

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

    @abstractmethod
    def compute(self, inputs: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Do what :meth:`forward` does with inputs that it has checked, without gradients."""

    @abstractmethod
    def dense_module(self) -> nn.Linear | nn.Conv1d:
        """Give the dense module that this one stands for, with the same bias."""

    def dense_weight(self) -> Float[Tensor, "rows ..."]:
        """Give the weight, in the shape that it has in the dense module, bit for bit except for the sign of zeros."""
        width = self.width or self.cols
        blocks = -(-self.cols // width)
        counts = self.offsets.diff().to(torch.int64)
        row = torch.arange(self.rows).repeat(blocks).repeat_interleave(counts)
        weight = self.values.new_zeros(self.rows, self.cols)
        weight[row, self.columns.to(torch.int64) & 0xFFFF if self.width else self.columns.to(torch.int64)] = self.values
        return weight.view(self.shape)

    def _as_dense(self, module: Any) -> Any:
        """Give the weight and the bias to a dense module without them."""
        module.weight, module.bias = nn.Parameter(self.dense_weight()), self.bias
        return module.train(self.training)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.dense_weight()

    def _load_from_state_dict(self, *arguments: Any) -> None:
        raise UserError("an accelerated model takes no other weights; load them before sparsewav.accelerate")

    def extra_repr(self) -> str:
        return f"sparsity={1 - self.nonzeros / (self.rows * self.cols):.4f}"


class SparseLinear(SparseModule):
    """A :class:`torch.nn.Linear` that maps (..., in_features) to (..., out_features).

    Args:
        dense: The dense module, whose bias is shared.
        width: As of :class:`SparseModule`.

    Raises:
        UserError: As of :class:`SparseModule`.
    """

    def __init__(self, dense: nn.Linear, width: int | None) -> None:
        super().__init__(dense, width)
        self.out_features, self.in_features = dense.weight.shape

    def compute(self, inputs: Float[Tensor, "*batch in_features"]) -> Float[Tensor, "*batch out_features"]:
        """Multiply all frames at once."""
        outputs = self._multiply(inputs.reshape(-1, self.in_features))
        return outputs.view(*inputs.shape[:-1], self.out_features)

    def _multiply(self, inputs: Float[Tensor, "frames in_features"]) -> Float[Tensor, "frames out_features"]:
        if self.width is not None:
            arrays = (self.offsets, self.columns, self.values, self.bias)
            return multiply(inputs.contiguous(), self.out_features, self.width, *arrays)
        shape = (self.out_features, self.in_features)
        weight = torch.sparse_csr_tensor(self.offsets, self.columns, self.values, shape, check_invariants=False)
        outputs = (weight @ inputs.T.contiguous()).T.contiguous()
        return outputs if self.bias is None else outputs.add_(self.bias)

    def dense_module(self) -> nn.Linear:
        """Give the linear module."""
        return self._as_dense(nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta"))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {super().extra_repr()}"


class SparseConv1d(SparseModule):
    """A :class:`torch.nn.Conv1d` that maps (batch, in_channels, length) to (batch, out_channels, frames).

    Args:
        dense: The dense module, of which :func:`why_dense` says nothing; its bias is shared.
        width: Columns in a block of the kernel's layout, where a column is one tap of one channel.

    Raises:
        UserError: As of :class:`SparseModule`, or the convolution is of another kind.
    """

    def __init__(self, dense: nn.Conv1d, width: int) -> None:
        if reason := why_dense(dense):
            raise UserError(f"the convolution has no sparse product, because {reason}; keep it dense")
        super().__init__(dense, width)
        self.out_channels, self.in_channels, self.kernel_size = dense.weight.shape
        self.stride = dense.stride[0]

    def compute(
        self, inputs: Float[Tensor, "*batch in_channels length"]
    ) -> Float[Tensor, "*batch out_channels frames"]:
        """Convolve; what has no frames or another shape is left to PyTorch, which refuses it or knows what to give."""
        batch = inputs if inputs.dim() == 3 else inputs[None]
        if (
            batch.dim() != 3
            or batch.shape[1] != self.in_channels
            or batch.shape[2] < self.kernel_size
            or not len(batch)
        ):
            return nn.functional.conv1d(inputs, self.dense_weight(), self.bias, self.stride)
        assert self.width is not None
        sizes = (self.out_channels, self.kernel_size, self.stride, self.width)
        outputs = convolve(batch, *sizes, self.offsets, self.columns, self.values, self.bias)
        return outputs if inputs.dim() == 3 else outputs[0]

    def dense_module(self) -> nn.Conv1d:
        """Give the convolution."""
        sizes = (self.in_channels, self.out_channels, self.kernel_size, self.stride)
        return self._as_dense(nn.Conv1d(*sizes, bias=self.bias is not None, device="meta"))

    def extra_repr(self) -> str:
        sizes = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        return f"{sizes}, {super().extra_repr()}"


def why_dense(convolution: nn.Conv1d) -> str:
    """Say why there is no sparse product for a convolution; empty if there is one."""
    if convolution.padding not in ((0,), "valid"):
        return "it pads its input"
    if convolution.groups != 1:
        return "its channels are in groups"
    if convolution.dilation != (1,):
        return "it is dilated"
    if convolution.weight[0].numel() > MAX_COLUMNS:
        return f"channels times kernel are more than {MAX_COLUMNS}"
    return ""


class _Product(torch.autograd.Function):
    """The product, which raises an error in the backward pass instead of dropping the gradient silently."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, module: SparseModule) -> Tensor:
        return module.compute(inputs.detach())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        raise UserError("an accelerated model cannot be trained; train it before sparsewav.accelerate")
