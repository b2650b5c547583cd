"""A weight matrix that is read only: allocated uninitialised, filled from a checkpoint, never trained."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from model_shards.packing import has_int8_products, pack, pack_int8
from model_shards.quantization import Quantization, quantize_matrices, widened_product


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
        # [P, in_features] -> [P, out_features], once it is laid out
        self._multiply: Callable[[torch.Tensor], torch.Tensor] | None = None

    def lay_out(self) -> None:
        """Lays the matrix out for this device (model_shards.packing); once, after it was filled.

        Where there is a layout, `weight` has no elements afterwards.
        """
        packed = pack(self.weight.data[None])
        if packed is not None:
            operand = packed.instructions.operand_dtype
            self._multiply = lambda x: packed.multiply(x.to(operand), (x.shape[0],))
            release(self.weight)

    def lay_out_int8(self) -> None:
        """As `lay_out`, in 8 bits; `weight` has no elements afterwards. Raises ValueError for what is not finite.

        Of a bfloat16 model on a CPU with 8-bit dot products activations are quantized too; elsewhere the product with
        the widened matrix is scaled, as that of `model_shards.expert_matrix.QuantizedExpertMatrix`.
        """
        rows = quantize_matrices([self.weight.data], Quantization.INT8)
        release(self.weight)
        multiply = None
        if has_int8_products(self._dtype, rows.values.device):
            multiply = pack_int8(rows.values[None], rows.scale_inv[None])
        if multiply is None:
            self._multiply = lambda x: widened_product(x.to(self._dtype), rows).to(self._dtype)
        else:
            self._multiply = lambda x: multiply(x, (x.shape[0],))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features], in x's dtype."""
        return self.product(x).to(x.dtype)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """As `forward`, in the dtype that the product has anyway: not narrower than x's."""
        if self._multiply is None:
            return F.linear(x, self.weight, self.bias)
        product = self._multiply(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], self._out_features)
        return product if self.bias is None else product.add_(self.bias)
