"""x W^T on a CPU with the matrix laid out once, after it was loaded: what the CPU at hand is quickest at.

Shapes: P rows, O output and I input features.

bfloat16 matrices, measured in benchmarks/NOTES.md:
- a CPU with bfloat16 products (AVX512_BF16, AMX): oneDNN's blocked layout, operands of bfloat16;
- any other with AVX2 and F16C: FBGEMM's layout of float16, which it widens in registers, operands of float32. A
  bfloat16 has fewer digits than a float16, so no digit is lost; what is smaller than float16's smallest step is off by
  at most 2^-25. A matrix with an element beyond float16's range stays as it is;
- others, and float32: F.linear on the matrix as it lies.

int8 matrices under bfloat16 activations:
- a CPU with 8-bit dot products (VNNI): oneDNN's layout. Activations are quantized to 8 bits too, each row by itself.

A layout takes as many bytes as the matrix; it is opaque, and the matrix cannot be had back.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from model_shards.quantization import Quantization, row_scales

_LARGEST_HALF = 65504.0
# Rows that oneDNN is told to lay the matrix out for: a decode batch's.
_TYPICAL_ROWS = 32

# [P, I] -> [P, O], both in the operand's dtype.
Multiply = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Packing:
    """A way to lay matrices out."""

    operand: torch.dtype  # of x, and of the product
    pack: Callable[[torch.Tensor, torch.Tensor | None], Multiply]  # from W [O, I] and bias [O]


def choose_packing(dtype: torch.dtype, device: torch.device) -> Packing | None:
    """How matrices of `dtype` are laid out on this machine's `device`; None: as they lie."""
    if device.type != "cpu" or dtype is not torch.bfloat16:
        return None
    able = torch.cpu.get_capabilities()
    if able.get("avx512_bf16") or able.get("amx_bf16"):
        return Packing(torch.bfloat16, _pack_blocked)
    if able.get("avx2") and able.get("fma3") and able.get("f16c"):
        return Packing(torch.float32, _pack_half)
    return None


def has_int8_products(device: torch.device) -> bool:
    """Whether `PackedInt8` is quick here."""
    able = torch.cpu.get_capabilities()
    return device.type == "cpu" and bool(able.get("avx512_vnni") or able.get("avx_vnni"))


def _pack_blocked(weight: torch.Tensor, bias: torch.Tensor | None) -> Multiply:
    blocked = torch.ops.mkldnn._reorder_linear_weight(weight, _TYPICAL_ROWS)

    def multiply(x: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, blocked, bias, "none", [], "")
        return product

    return multiply


def _pack_half(weight: torch.Tensor, bias: torch.Tensor | None) -> Multiply:
    wide = weight.float()
    wide_bias = None if bias is None else bias.float()
    least, most = (float(bound) for bound in wide.aminmax())
    if max(-least, most) > _LARGEST_HALF:
        kept = weight.clone()  # the caller lets go of its own
        return lambda x: F.linear(x, kept.float(), wide_bias)
    half = torch.ops.quantized.linear_prepack_fp16(wide, wide_bias)

    def multiply(x: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = torch.ops.quantized.linear_dynamic_fp16(x, half)
        return product

    return multiply


@dataclass(frozen=True)
class QuantizedActivations:
    """x of 8 bits: x[p] ~ (values[p] - ZERO_POINT) * scale[p]."""

    values: torch.Tensor  # [P, I] uint8
    scale: torch.Tensor  # [P, 1] float32


# Signed operands are far slower in oneDNN than unsigned ones about a zero point.
ZERO_POINT = 128


def quantize_activations(x: torch.Tensor) -> QuantizedActivations:
    """Each row of x [P, I] by itself, symmetric. A row that is not finite gives a scale that is not."""
    wide = x.float()
    scale = row_scales(wide, Quantization.INT8.largest)
    return QuantizedActivations((wide / scale).add_(ZERO_POINT).round_().clamp_(0, 255).to(torch.uint8), scale)


class PackedInt8:
    """One int8 matrix with a scale for each of its rows, multiplied by quantized activations."""

    def __init__(self, weight: torch.Tensor, scale_inv: torch.Tensor, zero_points: torch.Tensor) -> None:
        """From W [O, I] int8 and its scales [O] float32; `zero_points` [O] int64 are zeros, which many may share."""
        self._packed = torch.ops.onednn.qlinear_prepack(weight, None)
        self._scale_inv = scale_inv
        self._zero_points = zero_points

    def multiply(self, values: torch.Tensor) -> torch.Tensor:
        """(values - ZERO_POINT) W^T, [P, I] uint8 -> [P, O] float32: to be multiplied by the rows' scales."""
        product: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
            values,
            1.0,
            ZERO_POINT,
            self._packed,
            self._scale_inv,
            self._zero_points,
            None,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        )
        return product
