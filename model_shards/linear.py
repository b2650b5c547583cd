"""A weight matrix that is read only: allocated uninitialised, filled from a checkpoint, never trained."""

import torch
import torch.nn.functional as F
from torch import nn

from model_shards.kernels.grouped_product import PackedMatrices
from model_shards.packing import GroupedMultiply, pack, pack_int8
from model_shards.quantization import Quantization, QuantizedRows, quantize_matrices


def frozen_parameter(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """An uninitialised parameter without gradient, so that no operation on it records a graph."""
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)


def release(parameter: nn.Parameter) -> None:
    """Gives the parameter's memory back; it has no elements afterwards."""
    parameter.data = parameter.data.new_empty(0)


class FrozenLinear(nn.Module):
    """y = x W^T (+ b). W is [out_features, in_features] as Hugging Face stores it, until it is laid out."""

    def __init__(
        self, in_features: int, out_features: int, dtype: torch.dtype, device: torch.device, bias: bool = False
    ) -> None:
        super().__init__()
        self.weight = frozen_parameter((out_features, in_features), dtype, device)
        self.bias = frozen_parameter((out_features,), dtype, device) if bias else None
        self._out_features = out_features
        self._dtype = dtype
        self._packed: PackedMatrices | None = None
        self._multiply_int8: GroupedMultiply | None = None
        self._rows: QuantizedRows | None = None

    def lay_out(self) -> None:
        """Lays the matrix out for this device (model_shards.packing); once, after it was filled.

        Where there is a layout, `weight` has no elements afterwards.
        """
        self._packed = pack(self.weight.data[None])
        if self._packed is not None:
            release(self.weight)

    def lay_out_int8(self) -> None:
        """As `lay_out`, in 8 bits; `weight` has no elements afterwards. Raises ValueError for what is not finite.

        Of a bfloat16 model on a CPU with 8-bit dot products activations are quantized too; elsewhere the product with
        the widened matrix is scaled, as that of `model_shards.expert_matrix.QuantizedExpertMatrix`.
        """
        rows = quantize_matrices([self.weight.data], Quantization.INT8)
        release(self.weight)
        if self._dtype is torch.bfloat16:
            self._multiply_int8 = pack_int8(rows.values[None], rows.scale_inv[None])
        if self._multiply_int8 is None:
            self._rows = rows

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features], in x's dtype."""
        return self.product(x).to(x.dtype)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """As `forward`, in the dtype that the product has anyway: not narrower than x's."""
        if self._packed is not None:
            rows = x.reshape(-1, x.shape[-1]).to(self._packed.instructions.operand_dtype)
            product = self._packed.multiply(rows, (rows.shape[0],))
        elif self._multiply_int8 is not None:
            rows = x.reshape(-1, x.shape[-1])
            product = self._multiply_int8(rows, (rows.shape[0],))
        elif self._rows is not None:
            widened = F.linear(x.to(self._dtype), self._rows.values.to(self._dtype))
            product = (widened.float() * self._rows.scale_inv).to(self._dtype)
        else:
            return F.linear(x, self.weight, self.bias)
        product = product.view(*x.shape[:-1], self._out_features)
        return product if self.bias is None else product.add_(self.bias)
