"""Rotary positions with YaRN (arXiv:2309.00071), as DeepSeek-V2 applies them.

Shapes: T tokens, D qk_rope_head_dim. Dimensions (2i, 2i + 1) turn together by the angle position * inv_freq[i].

Where the published code and transformers differ (only one of mscale and mscale_all_dim set), this follows the
published code: cos and sin are scaled by yarn_mscale(factor, mscale) / yarn_mscale(factor, mscale_all_dim).
"""

import math

import torch
from torch import nn

from model_shards.config import ModelConfig, RopeConfig, YarnConfig


def yarn_mscale(factor: float, mscale: float) -> float:
    """Attention temperature of YaRN (section 3.4): 0.1 * mscale * ln(factor) + 1, and 1 without stretching."""
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0


def attention_scale(config: ModelConfig) -> float:
    """Factor on q.k before the softmax: 1 / sqrt(head dim), times mscale^2 under YaRN with mscale_all_dim."""
    scale = float((config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5)
    if config.rope.yarn is not None:
        scale *= yarn_mscale(config.rope.yarn.factor, config.rope.yarn.mscale_all_dim) ** 2
    return scale


class RotaryEmbedding(nn.Module):
    """Angles of positions. One module serves all layers; it holds D / 2 numbers and no table over positions."""

    def __init__(self, rope: RopeConfig, dim: int, device: torch.device) -> None:
        super().__init__()
        self.amplitude = 1.0
        if rope.yarn is not None:
            self.amplitude = yarn_mscale(rope.yarn.factor, rope.yarn.mscale) / yarn_mscale(
                rope.yarn.factor, rope.yarn.mscale_all_dim
            )
        self.inv_freq: torch.Tensor
        self.register_buffer("inv_freq", _inverse_frequencies(rope, dim).to(device), persistent=False)

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        """amplitude * e^(i angle), [T, D / 2] complex64, of int64 positions [T]."""
        angles = positions.float()[:, None] * self.inv_freq  # [T, D / 2]
        return torch.complex(angles.cos() * self.amplitude, angles.sin() * self.amplitude)


def apply_rotary(x: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
    """Turns each pair (2i, 2i + 1) of x [..., D]; rotary must broadcast to [..., D / 2]. Keeps x's dtype.

    A pair is a complex number, and turning it one product. x is copied: a view of odd strides is no complex tensor.
    """
    turned = x.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    torch.view_as_complex(turned.view(*x.shape[:-1], x.shape[-1] // 2, 2)).mul_(rotary)
    return turned.to(x.dtype)


def _inverse_frequencies(rope: RopeConfig, dim: int) -> torch.Tensor:
    """[dim / 2] float32."""
    wavelengths = rope.theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if rope.yarn is None:
        return 1.0 / wavelengths
    low, high = _correction_range(rope.yarn, rope.theta, dim)
    # 1 where a pair turns often within the original context (kept), 0 where it hardly turns (stretched). The
    # roundings below are the published code's: at position 160,000 one unit in the last place is 5e-4 radians.
    kept = 1 - ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return (1.0 / (rope.yarn.factor * wavelengths)) * (1 - kept) + (1.0 / wavelengths) * kept


def _correction_range(yarn: YarnConfig, theta: float, dim: int) -> tuple[float, float]:
    """First and last pair of the ramp between kept and stretched dimensions (YaRN, section 3.2)."""

    def pair_turning(rotations: float) -> float:
        """The pair that makes this many turns within the original context."""
        turns = yarn.original_max_position_embeddings / (rotations * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(theta))

    low = max(math.floor(pair_turning(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_turning(yarn.beta_slow)), dim - 1)
    # An empty ramp is a step, not a division by zero.
    return float(low), float(high) if high != low else low + 0.001
