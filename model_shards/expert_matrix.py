"""One weight matrix of each of a layer's experts, plain or quantized, behind one interface.

Shapes: E experts, O output and I input features, P rows.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from model_shards.linear import frozen_parameter
from model_shards.quantization import SCALE_SUFFIX, Quantization
from model_shards.quantized_linear import choose_product


class ExpertMatrix(nn.Module):
    """E matrices in the dtype of the activations."""

    def __init__(
        self, num_experts: int, in_features: int, out_features: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.weight = frozen_parameter((num_experts, out_features, in_features), dtype, device)  # [E, O, I]

    def multiply(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        """x W^T of one expert, [P, I] -> [P, O]; `x` is contiguous."""
        return F.linear(x, self.weight[expert])

    def slices(self, expert: int, rows: slice) -> Iterator[tuple[str, torch.Tensor]]:
        """(what follows the published name, writable view) for these rows of one expert's matrix."""
        yield "", self.weight.data[expert, rows]


class QuantizedExpertMatrix(ExpertMatrix):
    """E matrices of one byte an element, and a scale for each of their rows; they are never held in a wider type."""

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        dtype: torch.dtype,
        device: torch.device,
        quantization: Quantization,
    ) -> None:
        super().__init__(num_experts, in_features, out_features, quantization.dtype, device)
        self.scale_inv = frozen_parameter((num_experts, out_features), torch.float32, device)  # [E, O]
        self._product = choose_product(quantization, dtype, device)

    def multiply(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        """See `ExpertMatrix`."""
        return self._product(x, self.weight[expert], self.scale_inv[expert])

    def slices(self, expert: int, rows: slice) -> Iterator[tuple[str, torch.Tensor]]:
        """See `ExpertMatrix`; the scales follow the weight."""
        yield from super().slices(expert, rows)
        yield SCALE_SUFFIX, self.scale_inv.data[expert, rows]


def make_expert_matrix(
    num_experts: int,
    in_features: int,
    out_features: int,
    dtype: torch.dtype,
    device: torch.device,
    quantization: Quantization | None,
) -> ExpertMatrix:
    """Uninitialised matrices for activations of `dtype`."""
    if quantization is None:
        return ExpertMatrix(num_experts, in_features, out_features, dtype, device)
    return QuantizedExpertMatrix(num_experts, in_features, out_features, dtype, device, quantization)
