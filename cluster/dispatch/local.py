"""The exchange in one process: the same layout, no process group. The oracle for every other transport."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cluster.dispatch.attention import ExpertTables
from cluster.dispatch.base import ExpertCompute, StepPlan
from cluster.dispatch.layout import RowShape
from cluster.dispatch.row_batch import RowBatch
from cluster.dispatch.transport import BufferPool
from model_shards.placement import ExpertPlacement
from model_shards.routed import PendingCombine, RoutedExperts


class LocalDispatcher:
    """An `AttentionDispatcher` for one attention rank whose shards are called directly."""

    def __init__(self, shards: Sequence[ExpertCompute], placement: ExpertPlacement, device: torch.device) -> None:
        self._shards = tuple(shards)
        self._tables = ExpertTables(placement, device)
        self._device = device
        self._plan: StepPlan | None = None

    def begin_step(self, plan: StepPlan) -> None:
        """See `AttentionDispatcher`."""
        self._plan = plan

    def routed(self, micro_batch: int) -> RoutedExperts | None:
        """See `AttentionDispatcher`."""
        assert self._plan is not None, "begin_step comes first"
        if micro_batch not in self._plan.active_micro_batches:
            return None
        return _LocalRouted(self._shards, self._tables, self._plan.epoch, self._device)

    @property
    def rows_sent(self) -> tuple[int, ...]:
        """See `AttentionDispatcher`."""
        return self._tables.rows_sent

    @property
    def waited_s(self) -> float | None:
        """None: experts compute in `dispatch`."""
        return None


class _LocalRouted:
    def __init__(
        self, shards: tuple[ExpertCompute, ...], tables: ExpertTables, epoch: int, device: torch.device
    ) -> None:
        self._shards = shards
        self._tables = tables
        self._epoch = epoch
        self._pool = BufferPool(device)

    def dispatch(
        self, layer: int, hidden: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
    ) -> PendingCombine:
        """See `RoutedExperts`; computes at once."""
        num_tokens = hidden.shape[0]
        shape = RowShape(hidden.shape[1], topk_ids.shape[1], hidden.dtype)
        count = len(self._shards)
        if not num_tokens:
            return _Back(torch.empty_like(hidden))
        out = self._pool.take("dispatch", count * shape.dispatch_bytes(num_tokens))
        back = self._pool.take("combine", count * shape.combine_bytes(num_tokens))
        outgoing = shape.dispatch_segments(out, num_tokens, count)
        outgoing.header[:, 0] = self._epoch
        self._tables.pack(hidden, topk_ids, topk_weights, outgoing)
        for shard, sent, sums in zip(self._shards, out.chunk(count), back.chunk(count), strict=True):
            segment = shape.dispatch_segment(sent, num_tokens)
            RowBatch((segment,), (shape.combine_segment(sums, num_tokens),), self._pool, "batch").compute(layer, shard)
        return _Back(self._tables.add_up(shape.combine_segments(back, num_tokens, count)))


@dataclass(frozen=True)
class _Back:
    """`PendingCombine` whose result is there already."""

    result: torch.Tensor  # [T, H]

    def wait(self) -> torch.Tensor:
        """See `PendingCombine`."""
        return self.result
