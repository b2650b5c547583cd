"""The agent of a rank against a scripted coordinator."""

import asyncio
import contextlib
from concurrent.futures import Future

import pytest

from cluster import rank_agent as rank_agent_module
from cluster.control import Command, Join, Leave, OpenRendezvous, Registration
from cluster.epoch_thread import EpochEnd
from cluster.membership import Membership, Rendezvous
from cluster.rank_agent import RankAgent
from cluster.topology import Role, Topology
from model_shards.errors import UnavailableError
from model_shards.placement import contiguous_placement

WAIT_S = 5.0
IDENTITY = Registration("e0", Role.EXPERT, 0)
TOPOLOGY = Topology(1, 1)


def join_of(epoch):
    return Join(
        Membership(epoch, TOPOLOGY, contiguous_placement(8, 1), Rendezvous("127.0.0.1", 1), "gloo", 5.0, 5.0), 1
    )


class Coordinator:
    """Hands out the commands it is given; what it is told waits in `heard`."""

    def __init__(self):
        self.commands: asyncio.Queue[Command | UnavailableError] = asyncio.Queue()
        self.heard: asyncio.Queue[tuple] = asyncio.Queue()

    async def register(self, registration):
        self.heard.put_nowait(("register", registration))

    async def next_command(self, uid, timeout_s):
        command = await self.commands.get()
        if isinstance(command, UnavailableError):
            raise command
        return command

    async def rendezvous_opened(self, uid, epoch, rendezvous):
        self.heard.put_nowait(("rendezvous_opened", epoch))

    async def joined(self, uid, epoch):
        self.heard.put_nowait(("joined", epoch))

    async def epoch_ended(self, uid, epoch, error, is_fault):
        self.heard.put_nowait(("epoch_ended", epoch, error, is_fault))

    async def unregister(self, uid):
        self.heard.put_nowait(("unregister", uid))

    async def next_heard(self):
        return await asyncio.wait_for(self.heard.get(), WAIT_S)


class Runtime:
    """Joins stay open until the test decides; what it was told to leave waits in `left`."""

    def __init__(self):
        self.joins: asyncio.Queue[Future[None]] = asyncio.Queue()
        self.left: asyncio.Queue[int] = asyncio.Queue()

    def join(self, membership, global_rank):
        future: Future[None] = Future()
        self.joins.put_nowait(future)
        return future

    def leave(self, epoch):
        self.left.put_nowait(epoch)


@contextlib.asynccontextmanager
async def agent_at_work(names=None):
    coordinator, runtime = Coordinator(), Runtime()
    agent = RankAgent(coordinator, IDENTITY, runtime, None, (names if names is not None else []).append)
    task = asyncio.get_running_loop().create_task(agent.run())
    assert await coordinator.next_heard() == ("register", IDENTITY)
    try:
        yield agent, coordinator, runtime
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def test_a_rank_is_told_to_leave_the_epoch_it_still_joins():
    async def scenario():
        async with agent_at_work() as (_, coordinator, runtime):
            coordinator.commands.put_nowait(join_of(3))
            coordinator.commands.put_nowait(Leave(3))
            assert await asyncio.wait_for(runtime.left.get(), WAIT_S) == 3
            assert not (await runtime.joins.get()).done()

    asyncio.run(scenario())


def test_a_late_word_about_an_older_epoch_does_not_end_the_one_that_runs_and_is_answered():
    async def scenario():
        async with agent_at_work() as (_, coordinator, runtime):
            coordinator.commands.put_nowait(join_of(4))
            coordinator.commands.put_nowait(Leave(3))
            assert await coordinator.next_heard() == ("epoch_ended", 3, None, False)
            assert runtime.left.empty()

    asyncio.run(scenario())


def test_the_coordinator_learns_whether_an_epoch_ended_by_an_error_of_the_rank_itself():
    async def scenario():
        async with agent_at_work() as (agent, coordinator, _):
            agent.epoch_ended(EpochEnd(3, "out of memory", is_fault=True))
            assert await coordinator.next_heard() == ("epoch_ended", 3, "out of memory", True)

    asyncio.run(scenario())


def test_a_rank_goes_by_its_place_from_its_first_join_on():
    async def scenario():
        names = []
        async with agent_at_work(names) as (_, coordinator, runtime):
            assert names == []
            coordinator.commands.put_nowait(join_of(1))
            await asyncio.wait_for(runtime.joins.get(), WAIT_S)
            assert names == ["E0"]

    asyncio.run(scenario())


def test_a_new_registration_carries_what_an_earlier_coordinator_was_told(monkeypatch):
    monkeypatch.setattr(rank_agent_module, "_RETRY_S", 0.0)

    async def scenario():
        async with agent_at_work() as (agent, coordinator, runtime):
            away = UnavailableError("away")
            coordinator.commands.put_nowait(join_of(3))
            coordinator.commands.put_nowait(away)
            _, joining = await coordinator.next_heard()
            assert (joining.membership, joining.highest_epoch, joining.ended_epoch) == (None, 3, 0)
            (await runtime.joins.get()).set_result(None)
            assert await coordinator.next_heard() == ("joined", 3)
            coordinator.commands.put_nowait(away)
            _, running = await coordinator.next_heard()
            assert (running.membership, running.global_rank) == (join_of(3).membership, 1)
            assert (running.highest_epoch, running.ended_epoch) == (3, 0)
            agent.epoch_ended(EpochEnd(3, None, is_fault=False))
            assert await coordinator.next_heard() == ("epoch_ended", 3, None, False)
            coordinator.commands.put_nowait(away)
            _, waiting = await coordinator.next_heard()
            assert (waiting.membership, waiting.highest_epoch, waiting.ended_epoch) == (None, 3, 3)

    asyncio.run(scenario())


def test_a_rank_that_has_unregistered_says_nothing_more():
    async def scenario():
        async with agent_at_work() as (agent, coordinator, _):
            await agent.unregister()
            assert await coordinator.next_heard() == ("unregister", "e0")
            agent.epoch_ended(EpochEnd(3, None, is_fault=False))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert coordinator.heard.empty()

    asyncio.run(scenario())


def test_an_expert_rank_asked_for_a_rendezvous_stops_with_an_error():
    async def scenario():
        coordinator = Coordinator()
        agent = RankAgent(coordinator, IDENTITY, Runtime(), None, [].append)
        coordinator.commands.put_nowait(OpenRendezvous(1))
        with pytest.raises(UnavailableError, match="expert rank"):
            await asyncio.wait_for(agent.run(), WAIT_S)

    asyncio.run(scenario())
