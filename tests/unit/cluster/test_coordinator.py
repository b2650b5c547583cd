"""The coordinator against simulated ranks: it must form, mend and adopt epochs, and name what is missing."""

import asyncio
import contextlib
import time
from concurrent.futures import Future

import pytest

from cluster import coordinator as coordinator_module
from cluster.control import CellState, Join, Leave, OpenRendezvous, Registration
from cluster.coordinator import Coordinator
from cluster.epoch_thread import EpochEnd
from cluster.membership import Membership, Rendezvous
from cluster.rank_agent import RankAgent
from cluster.topology import Role, Topology
from model_shards.errors import UnavailableError
from model_shards.placement import contiguous_placement


class FakeRank:
    """A rank whose epochs are a set of numbers: joins succeed at once unless `stuck`."""

    def __init__(self, coordinator: Coordinator, uid: str, role: Role, ep_rank: int | None = None) -> None:
        host = self if role is Role.ATTENTION else None
        self.agent = RankAgent(coordinator, uid, role, ep_rank, self, host)
        self.memberships: list[tuple[Membership, int]] = []
        self.stuck = False
        self.task: asyncio.Task[None] | None = None

    def start(self) -> "FakeRank":
        self.task = asyncio.get_running_loop().create_task(self.agent.run())
        return self

    async def die(self) -> None:
        assert self.task is not None
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task

    def open_rendezvous(self, epoch: int) -> Rendezvous:
        return Rendezvous("127.0.0.1", 1000 + epoch)

    def join(self, membership: Membership, global_rank: int) -> "Future[None]":
        self.memberships.append((membership, global_rank))
        future: Future[None] = Future()
        if not self.stuck:
            future.set_result(None)
        return future

    def leave(self, epoch: int) -> None:
        self.end(None)

    def end(self, error: str | None) -> None:
        self.agent.epoch_ended(EpochEnd(self.memberships[-1][0].epoch, error, False))


def make_coordinator(num_attention: int, num_expert: int, join_timeout_s: float = 5.0) -> Coordinator:
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
async def running(coordinator: Coordinator):
    task = asyncio.get_running_loop().create_task(coordinator.run())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@pytest.fixture(autouse=True)
def short_roll_call(monkeypatch):
    monkeypatch.setattr(coordinator_module, "_ROLL_CALL_S", 0.3)
    monkeypatch.setattr(coordinator_module, "_RETRY_S", 0.01)


@pytest.mark.parametrize(("num_attention", "num_expert"), [(1, 1), (1, 3), (2, 4), (3, 2)])
def test_an_epoch_forms_when_every_rank_has_registered_and_each_gets_its_own_rank(num_attention, num_expert):
    async def scenario():
        coordinator = make_coordinator(num_attention, num_expert)
        async with running(coordinator):
            ranks = start_cell(coordinator, num_attention, num_expert)
            status = await coordinator.wait_running(5.0)
            assert status.epoch == 1
            assert status.missing == ()
            taken = sorted(rank.memberships[-1][1] for rank in ranks)
            assert taken == list(range(num_attention + num_expert))
            for ep_rank, rank in enumerate(ranks[num_attention:]):
                assert rank.memberships[-1][1] == num_attention + ep_rank
            for rank in ranks:
                await rank.die()

    asyncio.run(scenario())


def test_waiting_for_a_cell_that_lacks_a_rank_names_it():
    async def scenario():
        coordinator = make_coordinator(1, 2)
        async with running(coordinator):
            FakeRank(coordinator, "a0", Role.ATTENTION).start()
            FakeRank(coordinator, "e1", Role.EXPERT, 1).start()
            with pytest.raises(UnavailableError, match="missing ranks: E0"):
                await coordinator.wait_running(0.2)

    asyncio.run(scenario())


def test_an_aborted_epoch_is_followed_by_the_next_with_the_replacement_in_the_dead_ranks_place():
    async def scenario():
        coordinator = make_coordinator(1, 2)
        async with running(coordinator):
            a0, e0, e1 = start_cell(coordinator, 1, 2)
            await coordinator.wait_running(5.0)
            await e1.die()
            a0.end("peer lost")
            e0.end("peer lost")
            replacement = FakeRank(coordinator, "e1-again", Role.EXPERT, 1).start()
            for _ in range(200):
                await asyncio.sleep(0.02)
                if replacement.memberships and coordinator.status().state is CellState.RUNNING:
                    break
            assert coordinator.status().state is CellState.RUNNING
            assert replacement.memberships[-1][1] == 2
            assert a0.memberships[-1][0].epoch == e0.memberships[-1][0].epoch == coordinator.status().epoch >= 2
            assert {status.uid for status in coordinator.status().ranks} == {"a0", "e0", "e1-again"}

    asyncio.run(scenario())


def test_a_member_that_does_not_answer_the_roll_call_loses_its_place_to_a_standby():
    async def scenario():
        coordinator = make_coordinator(2, 1)
        async with running(coordinator):
            a0, a1, e0 = start_cell(coordinator, 2, 1)
            await coordinator.wait_running(5.0)
            standby = FakeRank(coordinator, "a2", Role.ATTENTION).start()
            await asyncio.sleep(0.05)
            assert not standby.memberships
            dead = a1
            await dead.die()
            a0.end("peer lost")
            e0.end("peer lost")
            for _ in range(200):
                await asyncio.sleep(0.02)
                if standby.memberships and coordinator.status().state is CellState.RUNNING:
                    break
            assert coordinator.status().state is CellState.RUNNING
            assert "a1" not in {status.uid for status in coordinator.status().ranks}

    asyncio.run(scenario())


def test_a_restarted_coordinator_adopts_the_epoch_that_still_runs_without_a_new_join():
    async def scenario():
        first = make_coordinator(1, 1)
        async with running(first):
            a0, e0 = start_cell(first, 1, 1)
            await first.wait_running(5.0)
            membership, _ = a0.memberships[-1]
            await a0.die()
            await e0.die()
        second = make_coordinator(1, 1)
        async with running(second):
            await second.register(Registration("a0", Role.ATTENTION, None, membership, 0))
            await second.register(Registration("e0", Role.EXPERT, 0, membership, 1))
            status = await second.wait_running(1.0)
            assert status.epoch == membership.epoch
            assert await second.next_command("a0", 0.05) is None

    asyncio.run(scenario())


def test_a_rank_that_is_not_registered_is_told_to_register_again():
    async def scenario():
        coordinator = make_coordinator(1, 1)
        with pytest.raises(UnavailableError, match="ghost is not registered"):
            await coordinator.next_command("ghost", 0.1)

    asyncio.run(scenario())


def test_commands_come_in_the_order_rendezvous_join_leave():
    async def scenario():
        coordinator = make_coordinator(1, 1)
        async with running(coordinator):
            await coordinator.register(Registration("a0", Role.ATTENTION, None))
            await coordinator.register(Registration("e0", Role.EXPERT, 0))
            assert await coordinator.next_command("a0", 1.0) == OpenRendezvous(1)
            await coordinator.rendezvous_opened("a0", 1, Rendezvous("127.0.0.1", 1))
            join = await coordinator.next_command("a0", 1.0)
            assert isinstance(join, Join)
            assert join.membership.topology == Topology(1, 1)
            assert isinstance(await coordinator.next_command("e0", 1.0), Join)
            await coordinator.joined("a0", 1)
            await coordinator.joined("e0", 1)
            await coordinator.wait_running(1.0)
            await coordinator.epoch_ended("e0", 1, "peer lost")
            assert await coordinator.next_command("a0", 1.0) == Leave(1)

    asyncio.run(scenario())
