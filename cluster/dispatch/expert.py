"""The expert side of the exchange: take the rows of all attention ranks, compute, send the sums back.

Shapes: A attention ranks with tokens, T_a tokens of rank a, R = sum of T_a, K experts per token, H hidden size.
"""

import time
from dataclasses import dataclass

import torch

from cluster.dispatch.base import ExpertCompute, StepPlan
from cluster.dispatch.compiled_exchange import ExpertExchange
from cluster.dispatch.compiled_rows import takes_a_team
from cluster.dispatch.fence import Fence, HostFence
from cluster.dispatch.layout import RowShape
from cluster.dispatch.order import Direction, Exchange, exchange_order
from cluster.dispatch.row_batch import CompiledBatch, RowBatch
from cluster.dispatch.transport import BufferPool, Carrier, Lane, Link, SharedCarrier
from cluster.topology import Topology


@dataclass(frozen=True)
class _Slot:
    """Where one micro-batch lives in steps of one plan."""

    dispatch: Carrier
    combine: Carrier
    batch: RowBatch
    compiled: ExpertExchange | None


class LockstepExpertDispatcher:
    """An `ExpertDispatcher` over the process group of one epoch."""

    def __init__(
        self,
        link: Link,
        topology: Topology,
        moe_layers: tuple[int, ...],
        shape: RowShape,
        fence: Fence,
        device: torch.device,
    ) -> None:
        self._link = link
        self._topology = topology
        self._moe_layers = moe_layers
        self._shape = shape
        self._fence = fence
        self._pool = BufferPool(device)
        self._index_of_layer = {layer: index for index, layer in enumerate(moe_layers)}
        self._plan: StepPlan | None = None
        self._shard: ExpertCompute | None = None
        self._slots: dict[int, _Slot] = {}
        self._order: tuple[Exchange, ...] = ()
        self._rows_received = 0
        self._host_waits = device.type == "cpu"
        self._computed_s: float | None = None

    @property
    def rows_received(self) -> int:
        """See `ExpertDispatcher`."""
        return self._rows_received

    @property
    def computed_s(self) -> float | None:
        """See `ExpertDispatcher`."""
        return self._computed_s

    def run_step(self, plan: StepPlan, shard: ExpertCompute) -> None:
        """See `ExpertDispatcher`. Leaves no exchange under way."""
        begun, waited = time.perf_counter(), self._link.waited_s
        self._answer(plan, shard)
        if self._host_waits:
            # Two looks at the clock a step: what is no wait is computing, and the little that goes with it.
            self._computed_s = time.perf_counter() - begun - (self._link.waited_s - waited)

    def _answer(self, plan: StepPlan, shard: ExpertCompute) -> None:
        self._begin_step(plan, shard)
        leaving: dict[int, Exchange] = {}
        for exchange in self._order:
            slot = self._slots[exchange.micro_batch]
            if exchange.direction is Direction.DISPATCH:
                self._link.start(exchange, slot.dispatch)
                continue
            compiled = slot.compiled
            if compiled is not None and compiled.prepare() and compiled.run(self._index_of_layer[exchange.layer]):
                continue
            self._link.end(Exchange(Direction.DISPATCH, exchange.layer, exchange.micro_batch), slot.dispatch)
            self._fence.admit(slot.batch.headers())
            # The sums of the layer before may still be leaving from the buffer that is about to be written.
            if exchange.micro_batch in leaving:
                self._link.end(leaving.pop(exchange.micro_batch), slot.combine)
            slot.batch.compute(exchange.layer, shard)
            self._link.start(exchange, slot.combine)
            leaving[exchange.micro_batch] = exchange
        for exchange in leaving.values():
            self._link.end(exchange, self._slots[exchange.micro_batch].combine)
        self._rows_received = self._fence.settle()

    def _begin_step(self, plan: StepPlan, shard: ExpertCompute) -> None:
        if plan == self._plan and shard is self._shard:
            return  # as most steps of decodes are
        self._plan, self._shard = None, shard  # until there is room for it
        self._slots = {index: self._slot(plan, index, shard) for index in plan.active_micro_batches}
        self._order = exchange_order(self._moe_layers, tuple(self._slots))
        self._plan = plan

    def _slot(self, plan: StepPlan, micro_batch: int, shard: ExpertCompute) -> _Slot:
        tokens = plan.tokens_of(micro_batch)
        in_sizes = [self._shape.dispatch_bytes(count) for count in tokens]
        out_sizes = [self._shape.combine_bytes(count) for count in tokens]
        received = self._pool.take(f"dispatch {micro_batch}", sum(in_sizes))
        sent = self._pool.take(f"combine {micro_batch}", sum(out_sizes))
        empty = self._pool.take("empty", 0)
        nothing = [0] * self._topology.world_size
        none_from_experts = [0] * self._topology.num_expert
        with_tokens = [index for index, count in enumerate(tokens) if count]
        incoming = torch.split(received, in_sizes)
        outgoing = torch.split(sent, out_sizes)
        batch = RowBatch(
            tuple(self._shape.dispatch_segment(incoming[index], tokens[index]) for index in with_tokens),
            tuple(self._shape.combine_segment(outgoing[index], tokens[index]) for index in with_tokens),
            self._pool,
            f"batch {micro_batch}",
        )
        dispatch = self._link.carrier(Lane(empty, received, nothing, in_sizes + none_from_experts))
        combine = self._link.carrier(Lane(sent, empty, out_sizes + none_from_experts, nothing))
        compiled = self._compiled(dispatch, combine, batch, shard)
        return _Slot(dispatch=dispatch, combine=combine, batch=batch, compiled=compiled)

    def _compiled(
        self, dispatch: Carrier, combine: Carrier, batch: RowBatch, shard: ExpertCompute
    ) -> ExpertExchange | None:
        """For few rows, and where waits are not traced: that is done in the other way."""
        if self._link.is_traced or not isinstance(dispatch, SharedCarrier) or not isinstance(combine, SharedCarrier):
            return None
        if takes_a_team(batch.rows.hidden.shape[0]):
            return None
        assert isinstance(self._fence, HostFence), "memory that is shared is a CPU's"
        return ExpertExchange(shard, CompiledBatch(batch), self._fence, dispatch, combine)
