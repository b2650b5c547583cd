"""The StepHeader: what every rank tells every other before a step.

One row of int64 per rank, gathered through shared memory, or over the control group (gloo, CPU):

    [ epoch | ends | tokens of micro-batch 0 | 1 | 2 ]        expert ranks send zero tokens

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
from cluster.process_group import EpochGroups
from cluster.shm.mesh import Mesh
from cluster.topology import Role, Topology
from model_shards.errors import EpochAbortedError

_FIELDS = 2 + MAX_MICRO_BATCHES


@dataclass(frozen=True)
class StepHeader:
    """One rank's word about the next step."""

    epoch: int
    tokens: tuple[int, ...]  # per micro-batch; at most MAX_MICRO_BATCHES
    ends: bool  # this rank wants the epoch to end at this step boundary


@dataclass(frozen=True)
class AgreedStep:
    """What all ranks concluded from all headers."""

    plan: StepPlan
    ends: bool

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
    tokens = tuple(tuple(row[2 : 2 + num_micro_batches]) for row in rows[: topology.num_attention])
    return AgreedStep(StepPlan(epoch, tokens), ends=any(row[1] for row in rows))


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
        padded = [*header.tokens, *([0] * (MAX_MICRO_BATCHES - len(header.tokens)))]
        try:
            rows = self._gather([header.epoch, int(header.ends), *padded], 1 + self._missed)
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
