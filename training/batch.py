"""What one training step reads, and what a phase of training is.

Shapes: B sequences, S positions of each.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

IGNORED = -100  # a label that no loss counts


@dataclass(frozen=True)
class Batch:
    """Padding stands at the end of a sequence, never before or between its tokens: attention is causal and has no
    other mask."""

    input_ids: torch.Tensor  # [B, S] int64
    labels: torch.Tensor  # [B, S] int64: the token that follows input_ids[b, s], already shifted; IGNORED: no loss
    mask: torch.Tensor  # [B, S] bool: False for padding

    @property
    def num_tokens(self) -> int:
        """Tokens that are not padding."""
        return int(self.mask.sum())


@dataclass(frozen=True)
class TrainPhase:
    """One pass of the learning-rate schedule over one kind of data."""

    name: str
    num_steps: int
    max_lr: float
    warmup_steps: int
    # A pure function of the step (from 0): a resumed run must draw the batches that an uninterrupted one draws.
    batches: Callable[[int], Batch]
