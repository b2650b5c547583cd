"""Experts that compute nothing: an exchange alone, in both of its ways."""

from dataclasses import dataclass

import torch

from cluster.dispatch.compiled_rows import Copies
from model_shards.kernels.program import Halt, Program

_FEW_ROWS = 256  # as a shard with six experts a row prepares (model_shards.compiled.experts)


@dataclass(frozen=True)
class Mirror:
    """An `ExpertCompute` whose answer is what it was sent."""

    num_layers: int

    def forward(self, layer: int, hidden: torch.Tensor, local_ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The rows."""
        return hidden

    def prepare(
        self, hidden: torch.Tensor, local_ids: torch.Tensor, weights: torch.Tensor, out: torch.Tensor, halt: Halt
    ) -> "PreparedMirror | None":
        """Of few rows."""
        return PreparedMirror(self.num_layers, hidden, out) if hidden.shape[0] <= _FEW_ROWS else None


class PreparedMirror:
    """One copy a layer."""

    is_current = True

    def __init__(self, num_layers: int, hidden: torch.Tensor, out: torch.Tensor) -> None:
        self._copy = Copies([(hidden, out)])
        self.programs = [Program([self._copy.call])] * num_layers
