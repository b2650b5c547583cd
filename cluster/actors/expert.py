"""The Ray shell of an expert rank."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING

import ray
from ray.actor import ActorHandle

from cluster.actors.client import RayCoordinatorClient
from cluster.actors.progress import LoadingReporter
from cluster.control import Registration
from cluster.epoch_thread import EpochEnd
from cluster.logs import configure_logging
from cluster.rank_agent import RankAgent
from cluster.spec import CellSpec
from cluster.topology import Role

if TYPE_CHECKING:
    from cluster.expert_shard import ExpertShard


class ExpertRank:
    """One expert shard. Starts loading when made; registers with the coordinator when loaded."""

    def __init__(self, spec: CellSpec, ep_rank: int, coordinator: ActorHandle) -> None:
        self._spec = spec
        self._ep_rank = ep_rank
        self._client = RayCoordinatorClient(coordinator)
        self._name = spec.topology.name(spec.topology.expert_global_rank(ep_rank))
        self._shard: ExpertShard | None = None
        self._running: asyncio.Task[None] | None = None
        self._log_as(self._name)

    async def run(self) -> None:
        """Loads the slice, then serves the coordinator's commands; returns only with an error.

        A restarted coordinator calls it again, while the first call still runs: there is one run at a time.
        """
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._run())
        await asyncio.shield(self._running)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        identity = Registration(f"expert-{uuid.uuid4().hex}", Role.EXPERT, self._ep_rank)
        progress = LoadingReporter(self._client, loop, identity.uid, self._name)
        agent: RankAgent | None = None

        def epoch_ended(end: EpochEnd) -> None:
            if agent is not None:
                loop.call_soon_threadsafe(agent.epoch_ended, end)

        shard = await asyncio.to_thread(self._load, epoch_ended, progress)
        self._shard = shard
        agent = RankAgent(self._client, identity, shard, None, self._log_as)
        try:
            await agent.run()
        finally:
            # Whoever runs it again loads a new one: two slices would not fit. The shard's thread holds `epoch_ended`,
            # that holds the agent and the agent the shard, so the circle is opened here and not by chance later.
            self._shard = None
            await asyncio.to_thread(shard.close)
            agent = None
            del shard

    def _load(self, epoch_ended: Callable[[EpochEnd], None], progress: LoadingReporter) -> ExpertShard:
        # Imported here: the coordinator imports this module to make the actors, and has no use for torch.
        from cluster.expert_shard import ExpertShard

        # Under Ray each rank sees its own GPU only, as number 0.
        return ExpertShard(self._spec, self._ep_rank, 0, epoch_ended, progress)

    def _log_as(self, name: str) -> None:
        configure_logging(Role.EXPERT.value, name, self._spec.log_level)

    async def rows_received(self) -> int:
        """Rows this shard has computed; the readiness check waits for the first."""
        return 0 if self._shard is None else self._shard.rows_received


ExpertActor = ray.remote(ExpertRank)
