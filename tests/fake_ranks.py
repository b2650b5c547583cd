"""Ranks without a model for tests of the control side: their epochs are numbers, and they join at once unless stuck."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from concurrent.futures import Future

from cluster.control import Registration
from cluster.coordinator import Coordinator
from cluster.epoch_thread import EpochEnd
from cluster.membership import Membership, Rendezvous
from cluster.rank_agent import RankAgent
from cluster.topology import Role, Topology
from model_shards.errors import UnavailableError
from model_shards.placement import contiguous_placement

WAIT_S = 5.0  # far less than any deadline of the coordinator: a test that meets it shows that one was waited for


class FakeRank:
    """The runtime and the agent of one rank; `start` begins to serve the coordinator's commands."""

    def __init__(self, coordinator: Coordinator, uid: str, role: Role, ep_rank: int | None = None) -> None:
        host = self if role is Role.ATTENTION else None
        self.agent = RankAgent(coordinator, Registration(uid, role, ep_rank), self, host, self._placed)
        self.names: list[str] = []
        self.memberships: list[tuple[Membership, int]] = []
        self.stuck = False
        self.joining: dict[int, Future[None]] = {}
        self.task: asyncio.Task[None] | None = None
        self._told_to_join = asyncio.Event()
        self.told_to_leave = asyncio.Event()

    def start(self) -> "FakeRank":
        self.task = asyncio.get_running_loop().create_task(self.agent.run())
        return self

    async def die(self) -> None:
        assert self.task is not None
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task

    @property
    def epochs(self) -> list[int]:
        return [membership.epoch for membership, _ in self.memberships]

    async def told_to_join(self, above: int) -> None:
        """Waits for a Join of an epoch above `above`."""
        async with asyncio.timeout(WAIT_S):
            while not self.epochs or self.epochs[-1] <= above:
                self._told_to_join.clear()
                await self._told_to_join.wait()

    def open_rendezvous(self, epoch: int) -> Rendezvous:
        return Rendezvous("127.0.0.1", 1000 + epoch)

    def join(self, membership: Membership, global_rank: int) -> "Future[None]":
        self.memberships.append((membership, global_rank))
        self._told_to_join.set()
        future: Future[None] = Future()
        if self.stuck:
            self.joining[membership.epoch] = future
        else:
            future.set_result(None)
        return future

    def leave(self, epoch: int) -> None:
        self.told_to_leave.set()
        joining = self.joining.pop(epoch, None)
        if joining is not None:
            joining.set_exception(UnavailableError("told to leave"))
        self.agent.epoch_ended(EpochEnd(epoch, None, False))

    def end(self, error: str | None, is_fault: bool = False) -> None:
        self.agent.epoch_ended(EpochEnd(self.epochs[-1], error, is_fault))

    def _placed(self, name: str) -> None:
        self.names.append(name)


def make_coordinator(num_attention: int, num_expert: int, join_timeout_s: float = 60.0) -> Coordinator:
    return Coordinator(
        Topology(num_attention, num_expert),
        contiguous_placement(8, num_expert),
        "gloo",
        join_timeout_s,
        5.0,
        time.monotonic,
    )


def start_cell(coordinator: Coordinator, num_attention: int, num_expert: int) -> list[FakeRank]:
    ranks = [FakeRank(coordinator, f"a{i}", Role.ATTENTION).start() for i in range(num_attention)]
    return ranks + [FakeRank(coordinator, f"e{i}", Role.EXPERT, i).start() for i in range(num_expert)]


@contextlib.asynccontextmanager
async def running(coordinator: Coordinator) -> AsyncIterator[None]:
    task = asyncio.get_running_loop().create_task(coordinator.run())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def next_running(coordinator: Coordinator, rank: FakeRank, above: int) -> int:
    """Waits until an epoch above `above`, with `rank` in it, runs; its number."""
    await rank.told_to_join(above)
    return (await coordinator.wait_running(WAIT_S)).epoch
