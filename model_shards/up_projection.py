"""What expands latents to keys and values: the two halves of `kv_b_proj`, head by head.

Shapes: N heads, P qk_nope_head_dim, V v_head_dim, R kv_lora_rank.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class UpProjections:
    """W_UK and W_UV (DeepSeek-V2, section 2.1.2), in the layout that an attention multiplies by."""

    w_uk: torch.Tensor  # [N, P, R]: k_nope = W_UK c
    w_uv: torch.Tensor  # [N, R, V]: transposed, v = c W_UV


def split_heads(weight: torch.Tensor, num_heads: int, nope_dim: int) -> UpProjections:
    """Views of kv_b_proj's weight [N * (P + V), R], whose rows are [P | V] head after head."""
    per_head = weight.view(num_heads, -1, weight.shape[-1])
    return UpProjections(per_head[:, :nope_dim], per_head[:, nope_dim:].transpose(1, 2))


def widened(up: UpProjections) -> UpProjections:
    """Copies in float32, contiguous where a product of few rows reads them; the weight itself may go."""
    return UpProjections(_copy(up.w_uk), _copy(up.w_uv))


def _copy(part: torch.Tensor) -> torch.Tensor:
    return part.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
