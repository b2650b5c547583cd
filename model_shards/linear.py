"""A weight matrix that is read only: allocated uninitialised, filled from a checkpoint, never trained."""

import torch
import torch.nn.functional as F
from torch import nn

from model_shards.kernels.grouped_product import PackedMatrices
from model_shards.packing import pack


def frozen_parameter(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """An uninitialised parameter without gradient, so that no operation on it records a graph."""
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)


def release(parameter: nn.Parameter) -> None:
    """Gives the parameter's memory back; it has no elements afterwards."""
    parameter.data = parameter.data.new_empty(0)


class FrozenLinear(nn.Module):
    """y = x W^T (+ b). W is [out_features, in_features] as Hugging Face stores it, until `lay_out`."""

    def __init__(
        self, in_features: int, out_features: int, dtype: torch.dtype, device: torch.device, bias: bool = False
    ) -> None:
        super().__init__()
        self.weight = frozen_parameter((out_features, in_features), dtype, device)
        self.bias = frozen_parameter((out_features,), dtype, device) if bias else None
        self._out_features = out_features
        self._packed: PackedMatrices | None = None

    def lay_out(self) -> None:
        """Lays the matrix out for this device (model_shards.packing); once, after it was filled.

        Where there is a layout, `weight` has no elements afterwards.
        """
        self._packed = pack(self.weight.data[None])
        if self._packed is not None:
            release(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features], in x's dtype."""
        return F.linear(x, self.weight, self.bias) if self._packed is None else self.product(x).to(x.dtype)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """As `forward`, in the dtype that the product has anyway: not narrower than x's."""
        if self._packed is None:
            return F.linear(x, self.weight, self.bias)
        rows = x.reshape(-1, x.shape[-1]).to(self._packed.instructions.operand_dtype)
        product = self._packed.multiply(rows, (rows.shape[0],)).view(*x.shape[:-1], self._out_features)
        return product if self.bias is None else product.add_(self.bias)
