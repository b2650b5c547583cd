"""The expert side of the exchange: take the rows of all attention ranks, compute, send the sums back.

Shapes: A attention ranks with tokens, T_a tokens of rank a, R = sum of T_a, K experts per token, H hidden size.
"""

from dataclasses import dataclass
from typing import Protocol

import torch

from cluster.dispatch.base import ExpertCompute, StepPlan
from cluster.dispatch.layout import DispatchSegment, RowShape
from cluster.dispatch.order import Direction, Exchange, exchange_order
from cluster.dispatch.transport import BufferPool, Carrier, Lane, Link
from cluster.topology import Topology
from model_shards.errors import EpochAbortedError


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
        self._incoming = incoming
        self._outgoing = outgoing
        self._sizes = [segment.hidden.shape[0] for segment in incoming]
        self._joined = incoming[0] if len(incoming) == 1 else _room_for(incoming, sum(self._sizes), pool, name)

    def headers(self) -> tuple[torch.Tensor, ...]:
        """Epoch and row count of each segment, each [2] int64."""
        return tuple(segment.header for segment in self._incoming)

    def compute(self, layer: int, shard: ExpertCompute) -> None:
        """Fills the outgoing segments from the incoming ones."""
        rows = self._joined
        if len(self._incoming) > 1:
            torch.cat([segment.hidden for segment in self._incoming], out=rows.hidden)
            torch.cat([segment.local_ids for segment in self._incoming], out=rows.local_ids)
            torch.cat([segment.weights for segment in self._incoming], out=rows.weights)
        sums = shard.forward(layer, rows.hidden, rows.local_ids, rows.weights)
        for outgoing, part in zip(self._outgoing, torch.split(sums, self._sizes), strict=True):
            outgoing.copy_(part)


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


class Fence(Protocol):
    """Counts rows and refuses those of another epoch."""

    def admit(self, headers: tuple[torch.Tensor, ...]) -> None:
        """Tallies headers, each [2] int64. May raise EpochAbortedError."""
        ...

    def settle(self) -> int:
        """Rows admitted so far. Raises EpochAbortedError on a stranger."""
        ...


class HostFence:
    """On CPU: a stranger is refused before it is computed."""

    def __init__(self, epoch: int, rank_name: str) -> None:
        self._epoch = epoch
        self._rank_name = rank_name
        self._rows = 0

    def admit(self, headers: tuple[torch.Tensor, ...]) -> None:
        """See `Fence`."""
        found: list[list[int]] = [header.tolist() for header in headers]
        _refuse(sum(epoch != self._epoch for epoch, _ in found), self._epoch, self._rank_name)
        self._rows += sum(count for _, count in found)

    def settle(self) -> int:
        """See `Fence`."""
        return self._rows


class DeviceFence:
    """On CUDA: the tally stays on the device, so that no layer makes the host wait, and is read once at the end of the
    step; what a stranger got back by then is its own rows' sums."""

    def __init__(self, epoch: int, device: torch.device, rank_name: str) -> None:
        self._epoch = epoch
        self._rank_name = rank_name
        self._tally = torch.zeros(2, dtype=torch.int64, device=device)  # rows, segments of another epoch

    def admit(self, headers: tuple[torch.Tensor, ...]) -> None:
        """See `Fence`."""
        found = torch.stack(headers)  # [A, 2]
        self._tally += torch.stack([found[:, 1].sum(), (found[:, 0] != self._epoch).sum()])

    def settle(self) -> int:
        """See `Fence`; the host waits for the device."""
        rows, strangers = self._tally.tolist()
        _refuse(strangers, self._epoch, self._rank_name)
        return int(rows)


def make_fence(epoch: int, device: torch.device, rank_name: str) -> Fence:
    """The fence for segments on `device`."""
    return HostFence(epoch, rank_name) if device.type == "cpu" else DeviceFence(epoch, device, rank_name)


def _refuse(strangers: int, epoch: int, rank_name: str) -> None:
    if strangers:
        raise EpochAbortedError(f"rank {rank_name} received {strangers} segments of another epoch than {epoch}")


@dataclass(frozen=True)
class _Slot:
    """Where one micro-batch lives during a step."""

    dispatch: Carrier
    combine: Carrier
    batch: RowBatch


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
        self._plan: StepPlan | None = None
        self._slots: dict[int, _Slot] = {}
        self._order: tuple[Exchange, ...] = ()
        self._rows_received = 0

    @property
    def rows_received(self) -> int:
        """See `ExpertDispatcher`."""
        return self._rows_received

    def run_step(self, plan: StepPlan, shard: ExpertCompute) -> None:
        """See `ExpertDispatcher`. Leaves no exchange under way."""
        self._begin_step(plan)
        leaving: dict[int, Exchange] = {}
        for exchange in self._order:
            slot = self._slots[exchange.micro_batch]
            if exchange.direction is Direction.DISPATCH:
                self._link.start(exchange, slot.dispatch)
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

    def _begin_step(self, plan: StepPlan) -> None:
        if plan == self._plan:
            return  # as most steps of decodes are
        self._plan = None  # until there is room for it
        self._slots = {index: self._slot(plan, index) for index in plan.active_micro_batches}
        self._order = exchange_order(self._moe_layers, tuple(self._slots))
        self._plan = plan

    def _slot(self, plan: StepPlan, micro_batch: int) -> _Slot:
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
        return _Slot(
            dispatch=self._link.carrier(Lane(empty, received, nothing, in_sizes + none_from_experts)),
            combine=self._link.carrier(Lane(sent, empty, out_sizes + none_from_experts, nothing)),
            batch=batch,
        )
