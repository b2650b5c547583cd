"""A weight matrix that is read only: allocated uninitialised, filled from a checkpoint, never trained."""

import torch
import torch.nn.functional as F
from torch import nn


def frozen_parameter(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """An uninitialised parameter without gradient, so that no operation on it records a graph."""
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)


class FrozenLinear(nn.Module):
    """y = x W^T (+ b). W is [out_features, in_features] as Hugging Face stores it."""

    def __init__(
        self, in_features: int, out_features: int, dtype: torch.dtype, device: torch.device, bias: bool = False
    ) -> None:
        super().__init__()
        self.weight = frozen_parameter((out_features, in_features), dtype, device)
        self.bias = frozen_parameter((out_features,), dtype, device) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features]."""
        return F.linear(x, self.weight, self.bias)
