"""The coordinator's shell, outside Ray."""

import asyncio

import pytest

from cluster.actors.coordinator import CoordinatorRank
from cluster.limits import EngineLimits
from cluster.spec import CellSpec
from cluster.topology import Topology
from deploy.models import default_model_directory

WAIT_S = 5.0


@pytest.fixture
def spec():
    limits = EngineLimits(64, 4, 32, 16, 16, 1)
    return CellSpec(str(default_model_directory()), Topology(1, 2), "cpu", "float32", limits, log_level="ERROR")


def test_a_start_that_failed_half_way_and_is_tried_again_forms_epochs_once(spec, monkeypatch):
    """Two that form epochs would hand out two memberships under one number."""

    async def scenario():
        rank = CoordinatorRank(spec)
        runs, kept = [], asyncio.Queue()
        room = iter([RuntimeError("the second actor cannot be made")])

        async def group():
            return None

        def make_expert(group, ep_rank):
            error = next(room, None) if ep_rank == 1 else None
            if error is not None:
                raise error
            return ep_rank

        async def keep_running(actor, ep_rank):
            kept.put_nowait(ep_rank)
            await asyncio.Event().wait()

        async def run():
            runs.append(1)
            await asyncio.Event().wait()

        monkeypatch.setattr(rank, "_expert_group", group)
        monkeypatch.setattr(rank, "_make_expert", make_expert)
        monkeypatch.setattr(rank, "_keep_running", keep_running)
        monkeypatch.setattr(rank._coordinator, "run", run)
        with pytest.raises(RuntimeError, match="the second actor"):
            await rank.start()
        await rank.start()
        await rank.start()
        assert [await asyncio.wait_for(kept.get(), WAIT_S) for _ in range(2)] == [0, 1]
        await asyncio.sleep(0)
        assert (runs, kept.qsize()) == ([1], 0)

    asyncio.run(scenario())
