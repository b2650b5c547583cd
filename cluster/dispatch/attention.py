"""The attention side of the exchange: cut tokens into rows, send them, add up what comes back.

Shapes: T tokens of this rank in the micro-batch, N expert shards, K experts per token, H hidden size.
"""

from dataclasses import dataclass

import torch

from cluster.dispatch.base import StepPlan
from cluster.dispatch.compiled_exchange import AttentionExchange
from cluster.dispatch.compiled_rows import CompiledPack, can_sum, compiled_sum, takes_a_team
from cluster.dispatch.layout import DispatchSegments, RowShape, local_id_table, pack_rows, sum_rows
from cluster.dispatch.order import Direction, Exchange
from cluster.dispatch.transport import BufferPool, Carrier, Lane, Link, SharedCarrier
from cluster.topology import Topology
from model_shards.placement import ExpertPlacement
from model_shards.routed import PendingCombine, RoutedExperts


@dataclass(frozen=True)
class _Slot:
    """Where one micro-batch lives in steps of one plan. Rows of a layer are back before the next layer's leave."""

    num_tokens: int  # T of this rank
    dispatch: Carrier
    combine: Carrier
    outgoing: DispatchSegments | None  # None when T = 0
    returning: torch.Tensor | None  # [N, T, H]
    compiled: AttentionExchange | None


class ExpertTables:
    """The placement as a tensor, what packs and adds up by it, and the rows sent so far. For one thread."""

    def __init__(self, placement: ExpertPlacement, device: torch.device) -> None:
        self._local_ids = local_id_table(placement, device)
        self._rows_sent = torch.zeros(placement.num_shards, dtype=torch.int64, device=device)
        self._compiled = self.compiled_pack() if device.type == "cpu" else None

    def compiled_pack(self) -> CompiledPack:
        """What packs and counts as `pack` does, on a CPU."""
        return CompiledPack(self._local_ids, self._rows_sent)

    def pack(
        self, hidden: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, segments: DispatchSegments
    ) -> None:
        """See `pack_rows`; counts the rows as sent."""
        if self._compiled is not None:
            self._compiled.pack(hidden, topk_ids, topk_weights, segments)
            return
        self._rows_sent += pack_rows(self._local_ids, hidden, topk_ids, topk_weights, segments)

    def add_up(self, returned: torch.Tensor) -> torch.Tensor:
        """See `sum_rows`."""
        return compiled_sum(returned) if can_sum(returned) else sum_rows(returned)

    @property
    def rows_sent(self) -> tuple[int, ...]:
        """Rows with an expert on each shard. Reads device memory: the host waits, only when asked."""
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
        self._host_waits = device.type == "cpu"
        self._plan: StepPlan | None = None
        self._slots: dict[int, _Slot] = {}

    def begin_step(self, plan: StepPlan) -> None:
        """See `AttentionDispatcher`."""
        if plan == self._plan:
            return  # as most steps of decodes are
        self._plan = None  # until there is room for it
        self._slots = {index: self._slot(plan, index) for index in plan.active_micro_batches}
        self._plan = plan

    def routed(self, micro_batch: int) -> RoutedExperts | None:
        """See `AttentionDispatcher`."""
        slot = self._slots.get(micro_batch)
        return None if slot is None else _Routed(self._link, self._tables, micro_batch, slot)

    @property
    def rows_sent(self) -> tuple[int, ...]:
        """See `AttentionDispatcher`."""
        return self._tables.rows_sent

    @property
    def waited_s(self) -> float | None:
        """See `AttentionDispatcher`."""
        return self._link.waited_s if self._host_waits else None

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
        outgoing = returning = None
        if num_tokens:
            outgoing = self._shape.dispatch_segments(out, num_tokens, num_shards)
            outgoing.header[:, 0] = plan.epoch
            returning = self._shape.combine_segments(back, num_tokens, num_shards)
        dispatch = self._link.carrier(Lane(out, empty, none_to_attention + [out_bytes] * num_shards, nothing))
        combine = self._link.carrier(Lane(empty, back, nothing, none_to_attention + [back_bytes] * num_shards))
        compiled = None
        if outgoing is not None and returning is not None:
            compiled = self._compiled(dispatch, outgoing, combine, returning)
        return _Slot(num_tokens, dispatch, combine, outgoing, returning, compiled)

    def _compiled(
        self, dispatch: Carrier, outgoing: DispatchSegments, combine: Carrier, returning: torch.Tensor
    ) -> AttentionExchange | None:
        """For few rows, and where waits are not traced: that is done in the other way."""
        if self._link.is_traced or not isinstance(dispatch, SharedCarrier) or not isinstance(combine, SharedCarrier):
            return None
        if takes_a_team(returning.shape[1]) or not can_sum(returning):
            return None
        return AttentionExchange(self._tables.compiled_pack(), dispatch, outgoing, combine, returning)


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
        dispatch = Exchange(Direction.DISPATCH, layer, self._micro_batch)
        if slot.compiled is not None:
            slot.compiled.send(hidden, topk_ids, topk_weights)
            return _Away(self._link, self._tables, dispatch, slot, hidden)
        if slot.outgoing is not None:
            self._tables.pack(hidden, topk_ids, topk_weights, slot.outgoing)
        self._link.start(dispatch, slot.dispatch)
        return _Away(self._link, self._tables, dispatch, slot, hidden)


class _Away:
    """`PendingCombine` of one layer and micro-batch."""

    def __init__(
        self, link: Link, tables: ExpertTables, dispatched: Exchange, slot: _Slot, hidden: torch.Tensor
    ) -> None:
        self._link = link
        self._tables = tables
        self._dispatched = dispatched
        self._slot = slot
        self._hidden = hidden

    def wait(self) -> torch.Tensor:
        """See `PendingCombine`. Starts the combine here, not earlier: that is its place in the order."""
        slot = self._slot
        if slot.compiled is None:
            self._link.end(self._dispatched, slot.dispatch)
        combine = Exchange(Direction.COMBINE, self._dispatched.layer, self._dispatched.micro_batch)
        self._link.start(combine, slot.combine)
        summed = None if slot.compiled is None else slot.compiled.receive()
        if summed is not None:
            return summed
        self._link.end(combine, slot.combine)
        return torch.empty_like(self._hidden) if slot.returning is None else self._tables.add_up(slot.returning)
