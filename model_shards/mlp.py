"""The SwiGLU feed-forward of dense layers and of shared experts."""

import torch
import torch.nn.functional as F
from torch import nn

from model_shards.linear import FrozenLinear


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden_size: int, intermediate_size: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.gate_proj = FrozenLinear(hidden_size, intermediate_size, dtype, device)
        self.up_proj = FrozenLinear(hidden_size, intermediate_size, dtype, device)
        self.down_proj = FrozenLinear(intermediate_size, hidden_size, dtype, device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, H] -> [T, H]."""
        out: torch.Tensor = self.down_proj.product(F.silu(self.gate_proj.product(x)) * self.up_proj.product(x))
        return out.to(x.dtype)
