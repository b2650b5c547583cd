"""The rows of one micro-batch as an expert shard gets them, and its answers.

Shapes: A attention ranks with tokens, T_a tokens of rank a, R = sum of T_a, K experts per token, H hidden size.
"""

from collections.abc import Sequence

import torch

from cluster.dispatch.base import ExpertCompute
from cluster.dispatch.compiled_rows import Copies
from cluster.dispatch.layout import DispatchSegment
from cluster.dispatch.transport import BufferPool
from model_shards.kernels.program import Call


class RowBatch:
    """The segments of one micro-batch, and their rows laid end to end for the shard.

    incoming   [ T_0 rows of A0 | T_2 rows of A2 | ... ]   ranks without tokens have no segment
    hidden     [ R rows, in the same order             ]   one segment alone is read where it lies
    outgoing   [ T_0 sums       | T_2 sums       | ... ]
    """

    def __init__(
        self,
        incoming: tuple[DispatchSegment, ...],
        outgoing: tuple[torch.Tensor, ...],
        pool: BufferPool,
        name: str,
    ) -> None:
        self.incoming = incoming
        self.outgoing = outgoing
        self._sizes = [segment.hidden.shape[0] for segment in incoming]
        self.rows = incoming[0] if len(incoming) == 1 else _room_for(incoming, sum(self._sizes), pool, name)

    def headers(self) -> tuple[torch.Tensor, ...]:
        """Epoch and row count of each segment, each [2] int64."""
        return tuple(segment.header for segment in self.incoming)

    def compute(self, layer: int, shard: ExpertCompute) -> None:
        """Fills the outgoing segments from the incoming ones."""
        rows = self.rows
        if len(self.incoming) > 1:
            torch.cat([segment.hidden for segment in self.incoming], out=rows.hidden)
            torch.cat([segment.local_ids for segment in self.incoming], out=rows.local_ids)
            torch.cat([segment.weights for segment in self.incoming], out=rows.weights)
        sums = shard.forward(layer, rows.hidden, rows.local_ids, rows.weights)
        for outgoing, part in zip(self.outgoing, torch.split(sums, self._sizes), strict=True):
            outgoing.copy_(part)


class CompiledBatch:
    """A batch on a CPU whose joining and splitting are calls of a program."""

    def __init__(self, batch: RowBatch) -> None:
        """Of a batch that lives as long."""
        incoming, outgoing, self.rows, self.headers = batch.incoming, batch.outgoing, batch.rows, batch.headers()
        self.join: list[Call] = []  # before the experts compute `rows`
        self.split: list[Call] = []  # after they have written `sums`
        self.sums = outgoing[0]  # [R, H]
        if len(incoming) > 1:
            rows = self.rows
            self.sums = torch.empty_like(rows.hidden)
            self._into = Copies(
                [
                    pair
                    for joined, parts in (
                        (rows.hidden, [segment.hidden for segment in incoming]),
                        (rows.local_ids, [segment.local_ids for segment in incoming]),
                        (rows.weights, [segment.weights for segment in incoming]),
                    )
                    for pair in zip(parts, _parts_like(joined, parts), strict=True)
                ]
            )
            self._out_of = Copies(list(zip(_parts_like(self.sums, outgoing), outgoing, strict=True)))
            self.join, self.split = [self._into.call], [self._out_of.call]


def _parts_like(joined: torch.Tensor, parts: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Views of `joined`, as many rows each as the parts have."""
    return torch.split(joined, [part.shape[0] for part in parts])


def _room_for(incoming: tuple[DispatchSegment, ...], num_rows: int, pool: BufferPool, name: str) -> DispatchSegment:
    """Buffers for the rows of all segments; their header is not used."""
    hidden_size, top_k = incoming[0].hidden.shape[1], incoming[0].local_ids.shape[1]
    dtype = incoming[0].hidden.dtype
    hidden = pool.take(f"{name} hidden", num_rows * hidden_size * dtype.itemsize)
    local_ids = pool.take(f"{name} local ids", num_rows * top_k * 4)
    weights = pool.take(f"{name} weights", num_rows * top_k * 4)
    return DispatchSegment(
        header=incoming[0].header,
        hidden=hidden.view(dtype).view(num_rows, hidden_size),
        local_ids=local_ids.view(torch.int32).view(num_rows, top_k),
        weights=weights.view(torch.float32).view(num_rows, top_k),
    )
