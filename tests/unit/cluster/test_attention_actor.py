"""The attention rank's shell, outside Ray."""

import asyncio
from types import SimpleNamespace

import pytest

from cluster.actors.attention import AttentionRank, _first_of, _why_in_no_epoch
from cluster.control import CellState, CellStatus
from cluster.limits import EngineLimits
from cluster.spec import CellSpec
from cluster.topology import Topology


def test_a_replica_that_is_taken_down_unregisters_before_it_leaves_its_epoch():
    async def scenario():
        done = []

        async def unregister():
            done.append("unregister")

        async def close():
            done.append("close")

        rank = SimpleNamespace(
            _agent_task=asyncio.create_task(asyncio.sleep(60.0)),
            _agent=SimpleNamespace(unregister=unregister),
            _replica=SimpleNamespace(close=close),
            _hub=SimpleNamespace(close=lambda: done.append("close the hub")),
        )
        # Not a real one: its __del__ is Serve's hook, a coroutine, which must not be left to the garbage collector.
        await AttentionRank._leave(rank)
        assert done == ["unregister", "close", "close the hub"]
        assert rank._agent_task.cancelling() or rank._agent_task.cancelled()

    asyncio.run(scenario())


def test_a_replica_that_failed_to_load_has_nothing_to_leave():
    asyncio.run(AttentionRank._leave(SimpleNamespace(_agent_task=None)))


def test_an_agent_that_fails_before_the_first_epoch_is_told_at_once_and_with_its_own_error():
    async def scenario():
        async def fail():
            raise OSError("no port is free")

        never = asyncio.Event()
        with pytest.raises(OSError, match="no port is free"):
            await asyncio.wait_for(_first_of(never.wait(), asyncio.create_task(fail())), 5.0)
        joined = asyncio.Event()
        joined.set()
        agent = asyncio.create_task(asyncio.sleep(60.0))
        await asyncio.wait_for(_first_of(joined.wait(), agent), 5.0)
        agent.cancel()

    asyncio.run(scenario())


def test_a_replica_that_joins_no_epoch_in_time_names_the_missing_ranks_and_both_bounds():
    class Client:
        async def status(self):
            return CellStatus(CellState.WAITING, 0, ("E1", "E3"), (), (), "E1: no such file")

    limits = EngineLimits(64, 4, 32, 16, 16, 1)
    spec = CellSpec("/models/a", Topology(1, 4), "cpu", "float32", limits, load_timeout_s=900.0, join_timeout_s=30.0)
    said = asyncio.run(_why_in_no_epoch("attention-1234", spec, Client()))
    for word in ("attention-1234", "load_timeout_s (900)", "join_timeout_s (30)", "E1, E3", "no such file"):
        assert word in said
