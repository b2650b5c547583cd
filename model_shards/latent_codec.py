"""What a row of the latent cache holds: the model's own numbers, or kv_c in one byte an element.

Shapes: T tokens, R kv_lora_rank, O qk_rope_head_dim, W stored elements of a row (`model_shards.latent_row`).

kv_c of a token is quantized by itself, as `model_shards.quantization` does a row of a matrix: what was written of
other tokens, before or after, has no part in it, so writing a token again writes the same bytes. k_pe, a ninth of
DeepSeek-V2's row, stays as it is.
"""

from typing import Protocol

import torch

from model_shards.config import ModelConfig
from model_shards.latent_row import SCALE_BYTES, row_bytes
from model_shards.quantization import Quantization, nearest_values, row_scales
from model_shards.scratch import Scratch

# Bit 31 and bits 20 to 26 of an int32.
_FP8_DIGITS = 0x87F00000 - 2**32


class LatentCodec(Protocol):
    """Between what attention computes with and what is stored."""

    width: int  # W
    stored: torch.dtype

    def encode(self, kv_c: torch.Tensor, k_pe: torch.Tensor) -> torch.Tensor:
        """Rows [T, W] of kv_c [T, R] and k_pe [T, O]."""
        ...

    def decode(self, rows: torch.Tensor) -> torch.Tensor:
        """[..., R + O] in the model's dtype of rows [..., W]; may be the same memory."""
        ...

    def widen(self, rows: torch.Tensor, scratch: Scratch) -> torch.Tensor:
        """[T, R + O] float32 of rows [T, W], in `scratch` or where they lie."""
        ...


class PlainCodec:
    """Rows in the model's dtype."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        self.width = config.latent_dim
        self.stored = dtype

    def encode(self, kv_c: torch.Tensor, k_pe: torch.Tensor) -> torch.Tensor:
        """See `LatentCodec`."""
        return torch.cat((kv_c, k_pe), dim=-1).to(self.stored)

    def decode(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows."""
        return rows

    def widen(self, rows: torch.Tensor, scratch: Scratch) -> torch.Tensor:
        """See `LatentCodec`."""
        return rows if rows.dtype == torch.float32 else scratch.take(*rows.shape).copy_(rows)


class QuantizedCodec:
    """Rows of bytes, drawn in `model_shards.latent_row`; one float32 scale a token."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, quantization: Quantization) -> None:
        self.width = row_bytes(config, dtype.itemsize, True)
        self.stored = torch.uint8
        self._dtype = dtype
        self._quantization = quantization
        self._latent_dim = config.latent_dim
        self._rank = config.kv_lora_rank
        self._widen_values = widen_fp8 if quantization is Quantization.FP8 else _copy
        self._values_at = SCALE_BYTES + config.qk_rope_head_dim * dtype.itemsize

    def encode(self, kv_c: torch.Tensor, k_pe: torch.Tensor) -> torch.Tensor:
        """See `LatentCodec`. A value that is not finite makes its own row so, and is no error: no other row has it."""
        wide = kv_c.float()
        scale_inv = row_scales(wide, self._quantization.largest)
        values = nearest_values(wide / scale_inv, self._quantization)
        rows = torch.zeros((kv_c.shape[0], self.width), dtype=torch.uint8, device=kv_c.device)
        rows[:, :SCALE_BYTES] = scale_inv.view(torch.uint8)
        rows[:, SCALE_BYTES : self._values_at] = k_pe.to(self._dtype).contiguous().view(torch.uint8)
        rows[:, self._values_at : self._values_at + self._rank] = values.view(torch.uint8)
        return rows

    def decode(self, rows: torch.Tensor) -> torch.Tensor:
        """See `LatentCodec`; a copy."""
        out = torch.empty((*rows.shape[:-1], self._latent_dim), dtype=self._dtype, device=rows.device)
        scale_inv, k_pe, values = self._parts(rows)
        out[..., : self._rank] = values.float() * scale_inv
        out[..., self._rank :] = k_pe
        return out

    def widen(self, rows: torch.Tensor, scratch: Scratch) -> torch.Tensor:
        """See `LatentCodec`."""
        out = scratch.take(rows.shape[0], self._latent_dim)
        scale_inv, k_pe, values = self._parts(rows)
        self._widen_values(values, out[:, : self._rank])
        out[:, : self._rank].mul_(scale_inv)
        out[:, self._rank :].copy_(k_pe)
        return out

    def _parts(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Views: scale_inv [..., 1], k_pe [..., O] and values [..., R]."""
        return (
            rows[..., :SCALE_BYTES].view(torch.float32),
            rows[..., SCALE_BYTES : self._values_at].view(self._dtype),
            rows[..., self._values_at : self._values_at + self._rank].view(self._quantization.dtype),
        )


def widen_fp8(values: torch.Tensor, out: torch.Tensor) -> None:
    """Copies finite float8_e4m3fn into float32 `out`, exactly, in four passes of which each is one vector instruction;
    torch's own conversion on a CPU takes ten times as long.

        s eeee mmm  ->  s 0000eeee mmm0...0     the float32 of the same digits, whose exponent is too small by 127 - 7
    """
    digits = out.view(torch.int32)
    digits.copy_(values.view(torch.int8))  # extends the sign over the bits that are masked next
    digits.bitwise_left_shift_(20).bitwise_and_(_FP8_DIGITS)
    out.mul_(2.0**120)


def _copy(values: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(values)


def choose_codec(config: ModelConfig, dtype: torch.dtype, quantization: Quantization | None) -> LatentCodec:
    """`quantization` None: the model's own dtype."""
    return PlainCodec(config, dtype) if quantization is None else QuantizedCodec(config, dtype, quantization)
