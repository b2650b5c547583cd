"""The attention side of the exchange: cut tokens into rows, send them, add up what comes back.

Shapes: T tokens of this rank in the micro-batch, N expert shards, K experts per token, H hidden size.
"""

from dataclasses import dataclass

import torch

from cluster.dispatch.base import StepPlan
from cluster.dispatch.layout import DispatchSegment, RowPlan, RowShape, pack_rows, plan_rows, sum_rows
from cluster.dispatch.order import Direction, Exchange
from cluster.dispatch.transport import BufferPool, Flight, Lane, Link
from cluster.topology import Topology
from model_shards.placement import ExpertPlacement
from model_shards.routed import PendingCombine, RoutedExperts


@dataclass(frozen=True)
class _Slot:
    """Where one micro-batch lives during a step. Its rows of one layer are back before the next layer's leave."""

    epoch: int
    num_tokens: int  # T of this rank
    dispatch: Lane
    combine: Lane
    outgoing: tuple[DispatchSegment, ...]  # one per shard; empty when T = 0
    returning: tuple[torch.Tensor, ...]  # one per shard, [T, H]


class ExpertTables:
    """The placement as tensors, and the rows sent so far."""

    def __init__(self, placement: ExpertPlacement, device: torch.device) -> None:
        self._num_shards = placement.num_shards
        self._shard_of = torch.tensor(placement.shard_of(), dtype=torch.int64, device=device)
        self._local_of = torch.tensor(placement.local_of(), dtype=torch.int64, device=device)
        self._rows_sent = torch.zeros(placement.num_shards, dtype=torch.int64, device=device)

    def plan(self, topk_ids: torch.Tensor) -> RowPlan:
        """Rows of `topk_ids` [T, K]; counts them as sent."""
        rows = plan_rows(topk_ids, self._shard_of, self._local_of, self._num_shards)
        self._rows_sent += rows.counts
        return rows

    @property
    def rows_sent(self) -> tuple[int, ...]:
        """Rows per shard. Reads device memory: the host waits, only when asked."""
        return tuple(int(count) for count in self._rows_sent.tolist())


class LockstepAttentionDispatcher:
    """An `AttentionDispatcher` over the process group of one epoch."""

    def __init__(
        self,
        link: Link,
        topology: Topology,
        placement: ExpertPlacement,
        attention_rank: int,
        shape: RowShape,
        device: torch.device,
    ) -> None:
        self._link = link
        self._topology = topology
        self._attention_rank = attention_rank
        self._shape = shape
        self._tables = ExpertTables(placement, device)
        self._pool = BufferPool(device)
        self._slots: dict[int, _Slot] = {}

    def begin_step(self, plan: StepPlan) -> None:
        """See `AttentionDispatcher`."""
        self._slots = {index: self._slot(plan, index) for index in plan.active_micro_batches}

    def routed(self, micro_batch: int) -> RoutedExperts:
        """See `AttentionDispatcher`."""
        slot = self._slots.get(micro_batch)
        return NothingRouted() if slot is None else _Routed(self._link, self._tables, micro_batch, slot)

    @property
    def rows_sent(self) -> tuple[int, ...]:
        """See `AttentionDispatcher`."""
        return self._tables.rows_sent

    def _slot(self, plan: StepPlan, micro_batch: int) -> _Slot:
        num_tokens = plan.tokens[self._attention_rank][micro_batch]
        num_shards = self._topology.num_expert
        nothing = [0] * self._topology.world_size
        none_to_attention = [0] * self._topology.num_attention
        empty = self._pool.take("empty", 0)
        out_bytes = self._shape.dispatch_bytes(num_tokens)
        back_bytes = self._shape.combine_bytes(num_tokens)
        out = self._pool.take(f"dispatch {micro_batch}", num_shards * out_bytes)
        back = self._pool.take(f"combine {micro_batch}", num_shards * back_bytes)
        shards = range(num_shards) if num_tokens else range(0)
        return _Slot(
            epoch=plan.epoch,
            num_tokens=num_tokens,
            dispatch=Lane(out, empty, none_to_attention + [out_bytes] * num_shards, nothing),
            combine=Lane(empty, back, nothing, none_to_attention + [back_bytes] * num_shards),
            outgoing=tuple(
                self._shape.dispatch_segment(out[shard * out_bytes : (shard + 1) * out_bytes], num_tokens)
                for shard in shards
            ),
            returning=tuple(
                self._shape.combine_segment(back[shard * back_bytes : (shard + 1) * back_bytes], num_tokens)
                for shard in shards
            ),
        )


class _Routed:
    """`RoutedExperts` of one micro-batch of one step."""

    def __init__(self, link: Link, tables: ExpertTables, micro_batch: int, slot: _Slot) -> None:
        self._link = link
        self._tables = tables
        self._micro_batch = micro_batch
        self._slot = slot

    def dispatch(
        self, layer: int, hidden: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
    ) -> PendingCombine:
        """See `RoutedExperts`."""
        slot = self._slot
        assert hidden.shape[0] == slot.num_tokens, "the micro-batch differs from the plan of the step"
        rows = None
        if slot.num_tokens:
            rows = self._tables.plan(topk_ids)
            pack_rows(rows, slot.epoch, hidden, topk_weights, slot.outgoing)
        flight = self._link.post(Exchange(Direction.DISPATCH, layer, self._micro_batch), slot.dispatch)
        return _Away(self._link, Exchange(Direction.COMBINE, layer, self._micro_batch), slot, flight, rows, hidden)


class _Away:
    """`PendingCombine` of one layer and micro-batch."""

    def __init__(
        self, link: Link, combine: Exchange, slot: _Slot, dispatched: Flight, rows: RowPlan | None, hidden: torch.Tensor
    ) -> None:
        self._link = link
        self._combine = combine
        self._slot = slot
        self._dispatched = dispatched
        self._rows = rows
        self._hidden = hidden

    def wait(self) -> torch.Tensor:
        """See `PendingCombine`. Posts the combine here, not earlier: that is its place in the order."""
        self._dispatched.wait()
        self._link.post(self._combine, self._slot.combine).wait()
        if self._rows is None:
            return torch.empty_like(self._hidden)
        return sum_rows(self._rows, self._slot.returning)


class NothingRouted:
    """`RoutedExperts` of a micro-batch without a token on any rank: no exchange."""

    def dispatch(
        self, layer: int, hidden: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
    ) -> PendingCombine:
        """See `RoutedExperts`; T must be 0."""
        assert hidden.shape[0] == 0, "the plan of the step has no token in this micro-batch"
        return Back(hidden)


@dataclass(frozen=True)
class Back:
    """`PendingCombine` whose result is there already."""

    result: torch.Tensor  # [T, H]

    def wait(self) -> torch.Tensor:
        """See `PendingCombine`."""
        return self.result
