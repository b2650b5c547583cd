"""The StepHeader: what every rank tells every other before a step.

One row of int64 per rank, gathered through shared memory, or over the control group (gloo, CPU):

    [ epoch | flags | prefill tokens | allowed ones, or -1 | expert time, or -1 | tokens of micro-batch 0 | 1 | 2 ]

Expert ranks send zero tokens and allow any number; they alone have a time to tell, microseconds of the step before,
if there was one.

All ranks see all rows, so all ranks decide alike: run, fall idle, or end the epoch.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from cluster.dispatch.base import StepPlan
from cluster.limits import MAX_MICRO_BATCHES
from cluster.membership import Membership
from cluster.prefill_budget import Elsewhere
from cluster.process_group import EpochGroups
from cluster.shm.mesh import Mesh
from cluster.topology import Role, Topology
from model_shards.errors import EpochAbortedError

_BEFORE_TOKENS = 5
_FIELDS = _BEFORE_TOKENS + MAX_MICRO_BATCHES
_ANY_NUMBER = -1
_NO_TIME = -1
_ENDS, _HAS_PREFILL = 1, 2  # flags


@dataclass(frozen=True)
class StepHeader:
    """One rank's word about the next step."""

    epoch: int
    tokens: tuple[int, ...]  # per micro-batch; at most MAX_MICRO_BATCHES
    ends: bool  # this rank wants the epoch to end at this step boundary
    num_prefill_tokens: int = 0  # of them all
    has_prefill: bool = False  # in this step or a later one
    allowed_prefill: int | None = None  # prefill tokens of the cell that this rank's decodes bear (PrefillBudget)
    computed_s: float | None = None  # by an expert rank since its last header (ExpertDispatcher.computed_s)

    def row(self) -> list[int]:
        """As it is sent; `agree` reads it."""
        allowed = _ANY_NUMBER if self.allowed_prefill is None else self.allowed_prefill
        time_us = _NO_TIME if self.computed_s is None else round(self.computed_s * 1e6)
        flags = self.ends * _ENDS | self.has_prefill * _HAS_PREFILL
        unused = [0] * (MAX_MICRO_BATCHES - len(self.tokens))
        return [self.epoch, flags, self.num_prefill_tokens, allowed, time_us, *self.tokens, *unused]


@dataclass(frozen=True)
class AgreedStep:
    """What all ranks concluded from all headers."""

    plan: StepPlan
    ends: bool
    num_prefill_tokens: tuple[int, ...]  # by attention rank
    has_prefill: tuple[bool, ...]
    allowed_prefill: tuple[int | None, ...]
    experts_s: float | None  # that the slowest expert rank computed in the step before; None: not all tell

    def elsewhere(self, attention_rank: int) -> Elsewhere:
        """What the other attention ranks told."""
        others = [rank for rank in range(len(self.num_prefill_tokens)) if rank != attention_rank]
        bounds = [bound for rank in others if (bound := self.allowed_prefill[rank]) is not None]
        return Elsewhere(
            min(bounds, default=None),
            sum(self.num_prefill_tokens[rank] for rank in others),
            sum(self.has_prefill[rank] for rank in others),
        )

    @property
    def idle(self) -> bool:
        """No rank has a token."""
        return not any(any(tokens) for tokens in self.plan.tokens)


def agree(rows: list[list[int]], epoch: int, topology: Topology, num_micro_batches: int) -> AgreedStep:
    """Folds the headers of all ranks into one decision.

    Raises EpochAbortedError when a header is of another epoch (fencing).
    """
    for global_rank, row in enumerate(rows):
        if row[0] != epoch:
            raise EpochAbortedError(
                f"rank {topology.name(global_rank)} sent a step header of epoch {row[0]} into epoch {epoch}"
            )
    attention, experts = rows[: topology.num_attention], rows[topology.num_attention :]
    times_us = [row[4] for row in experts]
    tokens = tuple(tuple(row[_BEFORE_TOKENS : _BEFORE_TOKENS + num_micro_batches]) for row in attention)
    return AgreedStep(
        StepPlan(epoch, tokens),
        ends=any(row[1] & _ENDS for row in rows),
        num_prefill_tokens=tuple(row[2] for row in attention),
        has_prefill=tuple(bool(row[1] & _HAS_PREFILL) for row in attention),
        allowed_prefill=tuple(None if row[3] == _ANY_NUMBER else row[3] for row in attention),
        experts_s=None if _NO_TIME in times_us else max(times_us) / 1e6,
    )


class HeaderExchange:
    """Gathers headers. Every rank must call `exchange` once a step."""

    def __init__(
        self, groups: EpochGroups, membership: Membership, global_rank: int, num_micro_batches: int, num_moe_layers: int
    ) -> None:
        self._topology = membership.topology
        self._global_rank = global_rank
        self._num_micro_batches = num_micro_batches
        self._num_moe_layers = num_moe_layers
        self._missed = 0  # exchanges of the last step that this rank has no part in
        self._gather: _Gather
        if groups.mesh is not None:
            self._gather = _SharedGather(groups.mesh, membership.exchange_timeout_s)
        else:
            assert groups.control is not None, "without shared memory there are groups"
            self._gather = _GroupGather(groups.control, self._topology.world_size)

    def exchange(self, header: StepHeader) -> AgreedStep:
        """Blocks until all ranks sent theirs, at most the epoch's exchange timeout.

        Where ranks without tokens have no part in a step's exchanges, they wait here for all of them, each of which may
        take that long; a rank that has a part meets the deadline of one, and closes the epoch for all.

        Raises EpochAbortedError when a rank is lost, late, or in another epoch.
        """
        try:
            rows = self._gather(header.row(), 1 + self._missed)
        except (RuntimeError, OSError) as error:
            raise EpochAbortedError(f"the step header exchange of epoch {header.epoch} failed: {error}") from error
        agreed = agree(rows, header.epoch, self._topology, self._num_micro_batches)
        self._missed = self._missed_in(agreed.plan)
        return agreed

    def _missed_in(self, plan: StepPlan) -> int:
        if self._topology.role(self._global_rank) is Role.EXPERT or any(plan.tokens[self._global_rank]):
            return 0
        return 2 * self._num_moe_layers * len(plan.active_micro_batches)


# (row, exchange timeouts to wait at most) -> rows of all ranks
_Gather = Callable[[list[int], int], list[list[int]]]


class _SharedGather:
    def __init__(self, mesh: Mesh, timeout_s: float) -> None:
        self._mesh = mesh
        self._timeout_s = timeout_s

    def __call__(self, row: list[int], timeouts: int) -> list[list[int]]:
        return self._mesh.gather(row, time.monotonic() + timeouts * self._timeout_s)


class _GroupGather:
    """Its buffers are made once per epoch. Every rank has a part in every exchange of a group: one timeout will do."""

    def __init__(self, control: dist.ProcessGroup, world_size: int) -> None:
        self._control = control
        self._mine = torch.zeros(_FIELDS, dtype=torch.int64)
        self._all = [torch.zeros(_FIELDS, dtype=torch.int64) for _ in range(world_size)]

    def __call__(self, row: list[int], timeouts: int) -> list[list[int]]:
        self._mine.copy_(torch.tensor(row))
        self._control.allgather([self._all], [self._mine]).wait()
        return [[int(value) for value in gathered] for gathered in torch.stack(self._all).tolist()]
