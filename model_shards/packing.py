"""x W^T on a CPU with the matrices laid out once, after they were loaded: what the CPU at hand is quickest at.

Shapes: E matrices, P rows that lie matrix after matrix, O output and I input features.

What is computed with is `model_shards.kernels`, on any CPU with AVX2 and FMA: operands are bfloat16 where the CPU
multiplies those, else float32. On others, and for float32, it is F.linear on the matrix as it lies.

int8 matrices under bfloat16 activations: the same on a CPU with 8-bit dot products (VNNI, and AMX beside it).
Activations are quantized to 8 bits too, each row by itself.

A layout takes as many bytes as the matrix; it is opaque, and the matrix cannot be had back.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from model_shards.kernels.grouped_product import PackedMatrices, Rows, Scaling
from model_shards.kernels.instructions import Arithmetic, Instructions, choose_instructions
from model_shards.kernels.program import Call
from model_shards.quantization import ZERO_POINT, Quantization, row_scales, rows_of_a_block

# [P, I] -> [P, O], float32 or the operand's dtype: the first counts[0] rows by matrix 0, and so on.
GroupedMultiply = Callable[[torch.Tensor, Sequence[int]], torch.Tensor]


def pack(weight: torch.Tensor) -> PackedMatrices | None:
    """Lays out W [E, O, I], which the caller may let go of; None: on this machine it is multiplied as it lies."""
    if weight.device.type != "cpu" or weight.dtype is not torch.bfloat16:
        return None
    instructions = choose_instructions(weight.dtype)
    return None if instructions is None else PackedMatrices(weight, instructions)


def program_instructions(dtype: torch.dtype, device: torch.device) -> Instructions | None:
    """What products of matrices of `dtype` use within compiled programs; None: there are none of them.

    Programs hand rows of bfloat16, or of 8 bits, from product to product.
    """
    if device.type != "cpu":
        return None
    instructions = choose_instructions(dtype)
    return None if instructions is None or instructions.arithmetic is Arithmetic.WIDEN else instructions


def has_int8_products(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether rows of `dtype` meet matrices of 8 bits as integers on this machine; elsewhere those are widened."""
    return dtype is torch.bfloat16 and program_instructions(torch.int8, device) is not None


def each_its_rows(
    x: torch.Tensor, counts: Sequence[int], multiply: Callable[[int, torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """`multiply` of every matrix that has rows, one after another; P > 0."""
    used = [matrix for matrix, count in enumerate(counts) if count]
    parts = torch.split(x, [counts[matrix] for matrix in used])
    return torch.cat([multiply(matrix, part) for matrix, part in zip(used, parts, strict=True)])


@dataclass(frozen=True)
class QuantizedActivations:
    """x of 8 bits: x[p] ~ (values[p] - ZERO_POINT) * scale[p]."""

    values: torch.Tensor  # [P, I] uint8
    scale: torch.Tensor  # [P, 1] float32


def quantize_activations(x: torch.Tensor) -> QuantizedActivations:
    """Each row of x [P, I] by itself, symmetric. A row that is not finite gives a scale that is not."""
    wide = x.float()
    scale = row_scales(wide, Quantization.INT8.largest)
    return QuantizedActivations((wide / scale).add_(ZERO_POINT).round_().clamp_(0, 255).to(torch.uint8), scale)


def pack_int8(weight: torch.Tensor, scale_inv: torch.Tensor) -> GroupedMultiply | None:
    """Lays out W [E, O, I] int8 with scales [E, O] float32 for x of any floating dtype, which is quantized.

    None where this machine has no 8-bit dot products.
    """
    if weight.device.type != "cpu":
        return None
    instructions = choose_instructions(weight.dtype)
    if instructions is None:
        return None
    packed = PackedInt8(weight, scale_inv, instructions)

    def multiply(x: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        quantized = quantize_activations(x)
        return packed.matrices.multiply_scaled(quantized.values, counts, packed.scaling(quantized.scale))

    return multiply


def _row_sums(weight: torch.Tensor) -> torch.Tensor:
    """[E, O] int32 of W [E, O, I] int8; some rows at a time, as torch widens all that it sums."""
    blocks = torch.split(weight.flatten(0, 1), rows_of_a_block(weight.shape[2]))
    return torch.cat([block.sum(-1, dtype=torch.int32) for block in blocks]).view(weight.shape[:2])


class PackedInt8:
    """Matrices of 8 bits with what their products are scaled by."""

    def __init__(self, weight: torch.Tensor, scale_inv: torch.Tensor, instructions: Instructions) -> None:
        """Copies W [E, O, I] int8 and scales [E, O] float32."""
        self.matrices = PackedMatrices(weight, instructions)
        missing = self.matrices.padded_outputs - weight.shape[1]
        # What ZERO_POINT in place of 0 adds to each output. Of widths that are served it stays far inside of 32 bits.
        self._zero_sums = torch.nn.functional.pad(_row_sums(weight) * ZERO_POINT, (0, missing))
        self._scales = torch.nn.functional.pad(scale_inv, (0, missing))

    def scaling(self, row_scales: torch.Tensor) -> Scaling:
        """For rows of these scales, [P] or [P, 1] float32."""
        return Scaling(self._zero_sums, self._scales, row_scales)

    @property
    def num_outputs(self) -> int:
        """O."""
        return self.matrices.num_outputs

    @property
    def padded_outputs(self) -> int:
        """O, rounded up to whole tiles."""
        return self.matrices.padded_outputs

    @property
    def nbytes(self) -> int:
        """Bytes of all matrices, without what they are scaled by."""
        return self.matrices.nbytes


Packed: TypeAlias = PackedMatrices | PackedInt8


def product_call(weights: Packed, x: Rows, row_scales: torch.Tensor, out: Rows, counts: int) -> Call:
    """See `PackedMatrices.call`. `row_scales` is what the rows of x are scaled by for weights of 8 bits, and must live
    as long as the call too; others have no use for it."""
    if isinstance(weights, PackedInt8):
        return weights.matrices.call(x, out, counts, scaling=weights.scaling(row_scales))
    return weights.call(x, out, counts)
