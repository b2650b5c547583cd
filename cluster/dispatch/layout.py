"""Which rows go where, and how they lie in the bytes of an exchange. Pure tensor code: no process group here.

Shapes: T tokens of one rank's micro-batch, N expert shards, K experts per token, H hidden size, S bytes of a segment.

A row is one (token, shard): a token goes to a shard once, however many of its K experts stand there, and one sum
comes back. What one attention rank exchanges with one shard is a segment. Row t of every segment is token t, so nothing
is sorted, and a segment's size follows from T alone: no counts are exchanged, and it cannot overflow.

    dispatch segment          offset
    +---------------------+   0
    | epoch, count        |   2 x int64                      rows with an expert on this shard
    +---------------------+   16
    | hidden    [T, H]    |   dtype of the model
    +---------------------+   aligned to 16
    | local ids [T, K]    |   int32                          -1: not on this shard
    +---------------------+   aligned to 16
    | weights   [T, K]    |   float32                        without meaning where the id is -1
    +---------------------+   aligned to 16: S

    combine segment: the sums [T, H], zeros for a token without an expert on the shard; padded to 16.

With T = 0 a segment has 0 bytes. An attention rank sends N segments of one size, one after another, and writes each
part of all of them in one call; a shard receives one from each attention rank that has tokens.

Worked example: T = 3, shard 0 holds experts {0, 1}, shard 1 holds {2, 3}, topk_ids = [[0, 1], [2, 0], [3, 2]]

    table  [[0, 1, -1, -1],       local id of each expert on shard 0
            [-1, -1, 0, 1]]       and on shard 1
    local ids of shard 0  [[0, 1], [-1, 0], [-1, -1]]     count 2
    local ids of shard 1  [[-1, -1], [0, -1], [1, 0]]     count 2
"""

from dataclasses import dataclass

import torch

from model_shards.placement import ExpertPlacement

_ALIGNMENT = 16
_HEADER_BYTES = 16


@dataclass(frozen=True)
class RowShape:
    """Shape of one row; fixed for an epoch."""

    hidden_size: int
    top_k: int
    dtype: torch.dtype

    def dispatch_bytes(self, num_tokens: int) -> int:
        """S of a dispatch segment for T tokens."""
        return self._weights_offset(num_tokens) + _aligned(4 * num_tokens * self.top_k) if num_tokens else 0

    def combine_bytes(self, num_tokens: int) -> int:
        """S of a combine segment for T tokens."""
        return _aligned(num_tokens * self.hidden_size * self.dtype.itemsize)

    def _ids_offset(self, num_tokens: int) -> int:
        return _HEADER_BYTES + self.combine_bytes(num_tokens)

    def _weights_offset(self, num_tokens: int) -> int:
        return self._ids_offset(num_tokens) + _aligned(4 * num_tokens * self.top_k)

    def dispatch_segment(self, segment: torch.Tensor, num_tokens: int) -> "DispatchSegment":
        """Views into one dispatch segment: uint8 [S], T > 0."""
        parts = self.dispatch_segments(segment, num_tokens, 1)
        return DispatchSegment(parts.header[0], parts.hidden[0], parts.local_ids[0], parts.weights[0])

    def combine_segment(self, segment: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """View of the sums in one combine segment: [T, H]."""
        return self.combine_segments(segment, num_tokens, 1)[0]

    def dispatch_segments(self, lane: torch.Tensor, num_tokens: int, count: int) -> "DispatchSegments":
        """Views into `count` dispatch segments that lie one after another: uint8 [count * S], T > 0."""
        segments = lane.view(count, -1)
        header_end = _HEADER_BYTES
        hidden_end = header_end + num_tokens * self.hidden_size * self.dtype.itemsize
        ids = self._ids_offset(num_tokens)
        weights = self._weights_offset(num_tokens)
        pairs = 4 * num_tokens * self.top_k
        return DispatchSegments(
            header=segments[:, :header_end].view(torch.int64),
            hidden=_as_rows(segments[:, header_end:hidden_end].view(self.dtype), num_tokens),
            local_ids=_as_rows(segments[:, ids : ids + pairs].view(torch.int32), num_tokens),
            weights=_as_rows(segments[:, weights : weights + pairs].view(torch.float32), num_tokens),
        )

    def combine_segments(self, lane: torch.Tensor, num_tokens: int, count: int) -> torch.Tensor:
        """View of the sums in `count` combine segments that lie one after another: [count, T, H]."""
        size = num_tokens * self.hidden_size * self.dtype.itemsize
        return _as_rows(lane.view(count, -1)[:, :size].view(self.dtype), num_tokens)


@dataclass(frozen=True)
class DispatchSegment:
    """Views into the bytes of one dispatch segment; writing them writes the segment."""

    header: torch.Tensor  # [2] int64: epoch, count
    hidden: torch.Tensor  # [T, H]
    local_ids: torch.Tensor  # [T, K] int32
    weights: torch.Tensor  # [T, K] float32


@dataclass(frozen=True)
class DispatchSegments:
    """Views into the bytes of the segments for all N shards."""

    header: torch.Tensor  # [N, 2] int64: epoch, count
    hidden: torch.Tensor  # [N, T, H]
    local_ids: torch.Tensor  # [N, T, K] int32
    weights: torch.Tensor  # [N, T, K] float32


def local_id_table(placement: ExpertPlacement, device: torch.device) -> torch.Tensor:
    """[N, num_logical] int32: the local id of each expert on each shard, -1 where it does not stand."""
    table = torch.full((placement.num_shards, placement.num_logical), -1, dtype=torch.int32)
    for shard, experts in enumerate(placement.shards):
        table[shard, list(experts)] = torch.arange(len(experts), dtype=torch.int32)
    return table.to(device)


def pack_rows(
    table: torch.Tensor, hidden: torch.Tensor, topk_ids: torch.Tensor, weights: torch.Tensor, segments: DispatchSegments
) -> torch.Tensor:
    """Writes all of the segments but their epoch; T > 0. Returns the rows with an expert on each shard: [N] int64.

    Args:
        table: see `local_id_table`. hidden: [T, H]. topk_ids: [T, K] int64. weights: [T, K] float32.

    Every shape follows from T, K and N, so nothing here makes the host wait for a GPU.
    """
    local_ids = table.index_select(1, topk_ids.flatten()).view_as(segments.local_ids)  # [N, T, K]
    counts = (local_ids >= 0).any(dim=-1).sum(dim=-1)
    segments.header[:, 1] = counts
    segments.hidden.copy_(hidden)
    segments.local_ids.copy_(local_ids)
    segments.weights.copy_(weights)
    return counts


def sum_rows(returned: torch.Tensor) -> torch.Tensor:
    """Adds up what the shards returned, [N, T, H] -> [T, H] in its dtype: a new tensor.

    The sum is taken in float32 and its order depends on N alone, so it is the same in every run.
    """
    return returned.sum(dim=0, dtype=torch.float32).to(returned.dtype)


def _as_rows(part: torch.Tensor, num_rows: int) -> torch.Tensor:
    """[N, num_rows * C] -> [N, num_rows, C], without a copy."""
    return part.view(part.shape[0], num_rows, part.shape[1] // num_rows)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
