"""Weights of one byte an element, with one float32 scale per output channel (a row of the matrix).

    scale_inv[o] = max_i |W[o, i]| / L          L = 127 for int8, 448 for fp8 (the largest torch.float8_e4m3fn)
    q[o, i]      = round(W[o, i] / scale_inv[o])    to the nearest, ties to even; never outside [-L, L]
    W[o, i]      ~ q[o, i] * scale_inv[o]

The scale has the name and the sense that DeepSeek-V3's checkpoints give it: what a stored value is multiplied by.
Every q is exact in bfloat16 and in float32, so a product with q loses nothing that the product itself does not lose.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
import torch.nn.functional as F

SCALE_SUFFIX = "_scale_inv"
# The smallest normal float32: what a row of zeros is divided by.
SMALLEST_SCALE = torch.finfo(torch.float32).tiny
# Activations are quantized as int8 weights are, and stored above this: CPUs multiply unsigned by signed.
ZERO_POINT = 128
_BLOCK_ELEMENTS = 2**19


class Quantization(StrEnum):
    """How a matrix of weights, or the latent cache, is stored and held."""

    INT8 = "int8"
    FP8 = "fp8"

    @property
    def dtype(self) -> torch.dtype:
        """Element type of a quantized weight."""
        return torch.int8 if self is Quantization.INT8 else torch.float8_e4m3fn

    @property
    def largest(self) -> int:
        """L."""
        return 127 if self is Quantization.INT8 else 448


@dataclass(frozen=True)
class QuantizedRows:
    """Some rows of a quantized matrix."""

    values: torch.Tensor  # [rows, in], int8 or float8_e4m3fn
    scale_inv: torch.Tensor  # [rows] float32


def quantize_rows(weight: torch.Tensor, quantization: Quantization) -> QuantizedRows:
    """Quantizes weight [rows, in], each row by itself. Raises ValueError when a value is not finite in float32."""
    wide = weight.float()
    scale_inv = row_scales(wide, quantization.largest)  # [rows, 1]
    if not bool(scale_inv.isfinite().all()):
        raise ValueError("a value is not finite")
    scaled = wide.div_(scale_inv) if wide is not weight else wide / scale_inv
    return QuantizedRows(nearest_values(scaled, quantization), scale_inv[:, 0])


def widened_product(x: torch.Tensor, rows: QuantizedRows) -> torch.Tensor:
    """x W^T, [..., in] -> [..., rows] float32, with the matrix widened to x's dtype for the call and never held so."""
    return F.linear(x, rows.values.to(x.dtype)).float() * rows.scale_inv


def quantize_matrices(weights: Sequence[torch.Tensor], quantization: Quantization) -> QuantizedRows:
    """The rows of all `weights` [rows, in], one matrix after another, as `quantize_rows`; some rows at a time, so that
    little is held beside what comes of it. Raises ValueError as that does."""
    rows, width = sum(len(weight) for weight in weights), weights[0].shape[1]
    device = weights[0].device
    values = torch.empty(rows, width, dtype=quantization.dtype, device=device)
    scale_inv = torch.empty(rows, dtype=torch.float32, device=device)
    start = 0
    for weight in weights:
        for block in torch.split(weight, rows_of_a_block(width)):
            quantized = quantize_rows(block, quantization)
            values[start : start + len(block)] = quantized.values
            scale_inv[start : start + len(block)] = quantized.scale_inv
            start += len(block)
    return QuantizedRows(values, scale_inv)


def rows_of_a_block(width: int) -> int:
    """How many rows of so many elements are widened at once."""
    return max(1, _BLOCK_ELEMENTS // max(1, width))


def row_scales(wide: torch.Tensor, largest: int) -> torch.Tensor:
    """scale_inv [..., 1] of rows [..., in] float32, whose largest value then is `largest`.

    Not finite for a row that is not, and for that row alone.
    """
    # A row of zeros, or of subnormals: the smallest normal scale gives zeros, and no division by zero.
    return (wide.abs().amax(-1, keepdim=True) / largest).clamp_min(SMALLEST_SCALE)


def nearest_values(scaled: torch.Tensor, quantization: Quantization) -> torch.Tensor:
    """q of values divided by their scale, which are overwritten."""
    if quantization is Quantization.INT8:
        scaled = scaled.round_()
    return scaled.clamp_(-quantization.largest, quantization.largest).to(quantization.dtype)
