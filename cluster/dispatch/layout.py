"""Which rows go where, and how they lie in the bytes of an exchange. Pure tensor code: no process group here.

Shapes: T tokens of one rank's micro-batch, N expert shards, K experts per token, H hidden size, S bytes of a segment.

A row is one (token, shard): it goes to a shard once, however many of its K experts stand there, and one sum comes
back. What one attention rank exchanges with one shard is a segment. It has room for all T tokens, so it cannot
overflow, and its size follows from T alone: no counts are exchanged.

    dispatch segment          offset                       rows 0 .. count-1 are real, ascending in the token index
    +---------------------+   0
    | epoch, count        |   2 x int64
    +---------------------+   16
    | hidden    [T, H]    |   dtype of the model           rows from count on repeat the last token
    +---------------------+   aligned to 16
    | local ids [T, K]    |   int32                        -1: not on this shard; all -1 from row count on
    +---------------------+   aligned to 16
    | weights   [T, K]    |   float32
    +---------------------+   aligned to 16: S

    combine segment: hidden [T, H], the sums in the order of the rows received; padded to 16.

With T = 0 a segment has 0 bytes. An attention rank sends N segments of one size, one after another; a shard
receives one from each attention rank that has tokens.

Worked example: T = 3, shard 0 holds experts {0, 1}, shard 1 holds {2, 3}, topk_ids = [[0, 1], [2, 0], [3, 2]]

    rows   [[0, 1, 3],      shard 0: tokens 0 and 1; 3 = T marks an unused row
            [1, 2, 3]]      shard 1: tokens 1 and 2
    counts  [2, 2]
    local ids of shard 0  [[0, 1], [-1, 0], [-1, -1]]
    local ids of shard 1  [[0, -1], [1, 0], [-1, -1]]
"""

from dataclasses import dataclass

import torch

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
        """Views into one dispatch segment: uint8 [S]."""
        header_end = _HEADER_BYTES
        hidden_end = header_end + num_tokens * self.hidden_size * self.dtype.itemsize
        ids = self._ids_offset(num_tokens)
        weights = self._weights_offset(num_tokens)
        pairs = 4 * num_tokens * self.top_k
        return DispatchSegment(
            header=segment[:header_end].view(torch.int64),
            hidden=segment[header_end:hidden_end].view(self.dtype).view(num_tokens, self.hidden_size),
            local_ids=segment[ids : ids + pairs].view(torch.int32).view(num_tokens, self.top_k),
            weights=segment[weights : weights + pairs].view(torch.float32).view(num_tokens, self.top_k),
        )

    def combine_segment(self, segment: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """View of the sums in one combine segment: [T, H]."""
        size = num_tokens * self.hidden_size * self.dtype.itemsize
        return segment[:size].view(self.dtype).view(num_tokens, self.hidden_size)


@dataclass(frozen=True)
class DispatchSegment:
    """Views into the bytes of one dispatch segment; writing them writes the segment."""

    header: torch.Tensor  # [2] int64: epoch, count
    hidden: torch.Tensor  # [T, H]
    local_ids: torch.Tensor  # [T, K] int32
    weights: torch.Tensor  # [T, K] float32


@dataclass(frozen=True)
class RowPlan:
    """Which tokens go to which shard."""

    rows: torch.Tensor  # [N, T] int64: token of each row, ascending; T marks an unused row
    counts: torch.Tensor  # [N] int64: rows in use
    local_ids: torch.Tensor  # [N, T, K] int32: local ids of each row on its shard, -1 elsewhere


def plan_rows(topk_ids: torch.Tensor, shard_of: torch.Tensor, local_of: torch.Tensor, num_shards: int) -> RowPlan:
    """Plans the rows of `topk_ids` [T, K]; `shard_of` and `local_of` are [num_experts] int64 on the same device.

    Every shape follows from T, K and N, so nothing here makes the host wait for a GPU.
    """
    num_tokens = topk_ids.shape[0]
    shard = shard_of[topk_ids]  # [T, K]
    here = shard == torch.arange(num_shards, device=topk_ids.device)[:, None, None]  # [N, T, K]
    wanted = here.any(dim=-1)  # [N, T]
    position = wanted.cumsum(dim=-1) - 1  # [N, T] row of each wanted token
    # Tokens not wanted write to a column of their own, cut off below.
    target = torch.where(wanted, position, num_tokens)
    rows = torch.full((num_shards, num_tokens + 1), num_tokens, dtype=torch.int64, device=topk_ids.device)
    tokens = torch.arange(num_tokens, device=topk_ids.device).expand(num_shards, num_tokens)
    rows = rows.scatter_(1, target, tokens)[:, :num_tokens]
    # One more token, without experts, for the unused rows to point at.
    local = torch.where(here, local_of[topk_ids], -1)  # [N, T, K]
    local = torch.nn.functional.pad(local, (0, 0, 0, 1), value=-1)  # [N, T + 1, K]
    by_row = local.gather(1, rows[:, :, None].expand(-1, -1, topk_ids.shape[1]))
    return RowPlan(rows, wanted.sum(dim=-1), by_row.to(torch.int32))


def pack_rows(
    plan: RowPlan, epoch: int, hidden: torch.Tensor, weights: torch.Tensor, segments: tuple[DispatchSegment, ...]
) -> None:
    """Writes the N dispatch segments of `hidden` [T, H] and `weights` [T, K] float32; T > 0."""
    # Unused rows repeat the last token: never uninitialised memory, which may hold NaN.
    sources = plan.rows.clamp(max=hidden.shape[0] - 1)
    for shard, segment in enumerate(segments):
        segment.header[0] = epoch
        segment.header[1] = plan.counts[shard]
        torch.index_select(hidden, 0, sources[shard], out=segment.hidden)
        torch.index_select(weights, 0, sources[shard], out=segment.weights)
        segment.local_ids.copy_(plan.local_ids[shard])


def sum_rows(plan: RowPlan, segments: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Adds the N combine segments, each [T, H], back at their tokens: [T, H] in their dtype.

    The sum over shards is taken in float32, in the order of ep_rank, so it is the same in every run.
    """
    num_tokens, hidden_size = segments[0].shape
    # Row T takes what comes back for unused rows.
    total = torch.zeros(num_tokens + 1, hidden_size, dtype=torch.float32, device=segments[0].device)
    for shard, segment in enumerate(segments):
        total.index_add_(0, plan.rows[shard], segment.float())
    return total[:num_tokens].to(segments[0].dtype)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
