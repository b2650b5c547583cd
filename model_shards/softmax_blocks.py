"""Softmax over keys that come block after block (Milakov and Gimelshein, arXiv:1805.02867): exact, and only one block
of scores is ever held.

With m the largest score so far, t = sum exp(s - m) and a = sum exp(s - m) v, a block that raises m to m' shrinks t and
a by exp(m - m'), and a / t is the attention over all blocks.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class RunningSoftmax:
    """State of n batches of r rows; indexing gives a view of the same state."""

    weighted: torch.Tensor  # [n, r, V], a
    total: torch.Tensor  # [n, r, 1], t
    largest: torch.Tensor  # [n, r, 1], m

    @staticmethod
    def empty(batches: int, rows: int, width: int) -> "RunningSoftmax":
        """Before any key, float32 on CPU."""
        return RunningSoftmax(
            torch.zeros(batches, rows, width),
            torch.zeros(batches, rows, 1),
            torch.full((batches, rows, 1), float("-inf")),
        )

    def part(self, batches: slice, rows: slice) -> "RunningSoftmax":
        """A view of some rows of some batches."""
        return RunningSoftmax(self.weighted[batches, rows], self.total[batches, rows], self.largest[batches, rows])

    def add(self, scores: torch.Tensor, value: torch.Tensor) -> None:
        """Takes in B keys: scores [n, r, B], which are overwritten, and value [n, B, V].

        Of the first keys that ever come each row must see one, which a score above -inf says.
        """
        peak = torch.maximum(self.largest, scores.amax(-1, keepdim=True))
        shrink = (self.largest - peak).exp_()
        self.largest.copy_(peak)
        scores.sub_(peak).exp_()
        self.total.mul_(shrink).add_(scores.sum(-1, keepdim=True))
        self.weighted.mul_(shrink).baddbmm_(scores, value)

    def finish(self, out: torch.Tensor) -> None:
        """Writes the attention into out [n, r, V]."""
        torch.div(self.weighted, self.total, out=out)
