"""x times a quantized matrix, and which way of computing it is taken. The one place to change when one is measured
to be better.

Shapes: P rows, weight [O, I] int8 or float8_e4m3fn, scale_inv [O] float32.

Candidates, and what is known of them (torch 2.13):

- widened: the matrix is converted to x's dtype for the call, multiplied, and the product scaled. Exact in what it
  reads (see `model_shards.quantization`), on every device and dtype; takes a widened copy of one matrix meanwhile.
- torch._weight_int8pack_mm: reads int8 as it lies, without a copy. On CPU in float32 it is as exact as the product of
  float32, with AVX2 and without. In bfloat16 it wants scales of bfloat16, which rounds every channel: not taken there.
- torch.ops.onednn.qlinear_pointwise, quantized::linear_dynamic (FBGEMM): quantize x too, which costs accuracy that
  weight-only quantization does not; they also keep a packed copy of their own. Not taken.
- on CUDA: a grouped GEMM that widens in registers. To be written and measured there.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from model_shards.quantization import Quantization

# (x [P, I], weight [O, I], scale_inv [O]) -> [P, O] in x's dtype.
QuantizedProduct = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def choose_product(quantization: Quantization, dtype: torch.dtype, device: torch.device) -> QuantizedProduct:
    """How activations of `dtype` on `device` are multiplied."""
    if quantization is Quantization.INT8 and dtype is torch.float32 and device.type == "cpu":
        return packed_int8_product
    return widened_product


def widened_product(x: torch.Tensor, weight: torch.Tensor, scale_inv: torch.Tensor) -> torch.Tensor:
    """By way of a copy of the matrix in x's dtype; works everywhere. The scale is applied in float32."""
    return (F.linear(x, weight.to(x.dtype)).float() * scale_inv).to(x.dtype)


def packed_int8_product(x: torch.Tensor, weight: torch.Tensor, scale_inv: torch.Tensor) -> torch.Tensor:
    """float32 on CPU, int8 weights; `x` must be contiguous."""
    return torch._weight_int8pack_mm(x, weight, scale_inv)
