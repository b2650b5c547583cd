"""Root mean square normalisation."""

import torch
import torch.nn.functional as F
from torch import nn

from model_shards.linear import frozen_parameter

# DeepseekV2Attention builds its two latent norms without passing `rms_norm_eps`, so they keep this default.
LATENT_NORM_EPS = 1e-6


class RMSNorm(nn.Module):
    """x / rms(x) * weight, in float32 and rounded once to x's dtype; transformers rounds before the weight, too."""

    def __init__(self, dim: int, eps: float, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = frozen_parameter((dim,), dtype, device)
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., dim] -> [..., dim]."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
