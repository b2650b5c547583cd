"""One weight matrix of each of a layer's experts, plain, quantized or laid out for the CPU, behind one interface.

Shapes: E experts, O output and I input features, P rows that lie expert after expert.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from model_shards.kernels.grouped_product import PackedMatrices
from model_shards.linear import frozen_parameter, release
from model_shards.packing import (
    GroupedMultiply,
    Packed,
    PackedInt8,
    each_its_rows,
    pack,
    pack_int8,
    program_instructions,
)
from model_shards.quantization import SCALE_SUFFIX, Quantization, QuantizedRows, widened_product


class GroupedMatrix(ABC):
    """E matrices, each multiplied by its own rows."""

    @abstractmethod
    def grouped(self, x: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """x W^T, [P, I] -> [P, O]: the first counts[0] rows by expert 0's matrix, and so on; P > 0.

        In x's dtype or a wider one.
        """


class ExpertMatrix(GroupedMatrix, nn.Module):
    """E matrices in the dtype of the activations, as they are loaded."""

    def __init__(
        self, num_experts: int, in_features: int, out_features: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.weight = frozen_parameter((num_experts, out_features, in_features), dtype, device)  # [E, O, I]

    def grouped(self, x: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """See `GroupedMatrix`."""
        return each_its_rows(x, counts, lambda expert, rows: F.linear(rows, self.weight[expert]))

    def stored(self) -> tuple[tuple[str, torch.Tensor], ...]:
        """(what follows the published name, writable tensor [E, O, ...]) for each part of the matrices."""
        return (("", self.weight.data),)

    def lay_out(self) -> GroupedMatrix:
        """The same matrices as this machine multiplies them fastest, once, after they were filled.

        That is this one as it lies, or another, which has taken its memory over: no parameter has elements then.
        """
        laid_out = self._laid_out()
        if laid_out is not self:
            for parameter in self.parameters():
                release(parameter)
        return laid_out

    def pack(self) -> Packed | None:
        """As `lay_out`, for compiled programs; None, and nothing has happened, where there are none for it."""
        packed = self._packed()
        if packed is not None:
            for parameter in self.parameters():
                release(parameter)
        return packed

    def _packed(self) -> Packed | None:
        instructions = program_instructions(self.weight.dtype, self.weight.device)
        return None if instructions is None else PackedMatrices(self.weight.data, instructions)

    def _laid_out(self) -> GroupedMatrix:
        packed = pack(self.weight.data)
        return self if packed is None else _LaidOut(packed.instructions.operand_dtype, packed.multiply)


class QuantizedExpertMatrix(ExpertMatrix):
    """E matrices of one byte an element, and a scale for each of their rows; they are never held in a wider type.

    A matrix is widened to x's dtype for the call and the product scaled in float32: exact in what it reads (see
    `model_shards.quantization`), on every device and dtype.
    """

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
        self._dtype = dtype
        self._quantization = quantization

    def grouped(self, x: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """See `GroupedMatrix`."""
        return each_its_rows(x.to(self._dtype), counts, self._widened)

    def stored(self) -> tuple[tuple[str, torch.Tensor], ...]:
        """See `ExpertMatrix`; the scales follow the weight."""
        return (*super().stored(), (SCALE_SUFFIX, self.scale_inv.data))

    def _laid_out(self) -> GroupedMatrix:
        # Under float32 nothing is to be rounded that was not, so it stays as it lies.
        if self._quantization is not Quantization.INT8 or self._dtype is not torch.bfloat16:
            return self
        multiply = pack_int8(self.weight.data, self.scale_inv.data)
        return self if multiply is None else _LaidOut(self._dtype, multiply)

    def _packed(self) -> Packed | None:
        instructions = program_instructions(self.weight.dtype, self.weight.device)
        if instructions is None or self._dtype is not torch.bfloat16:
            return None
        return PackedInt8(self.weight.data, self.scale_inv.data, instructions)

    def _widened(self, expert: int, rows: torch.Tensor) -> torch.Tensor:
        return widened_product(rows, QuantizedRows(self.weight[expert], self.scale_inv[expert]))


class _LaidOut(GroupedMatrix):
    def __init__(self, operand: torch.dtype, multiply: GroupedMultiply) -> None:
        self._operand = operand
        self._multiply = multiply

    def grouped(self, x: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        return self._multiply(x.to(self._operand), counts)


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
