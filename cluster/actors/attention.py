"""The Ray Serve shell of an attention rank."""

import asyncio
import dataclasses
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing

import ray
from ray import serve

from cluster.actors.client import RayCoordinatorClient
from cluster.actors.coordinator import get_or_create_coordinator
from cluster.actors.progress import LoadingReporter
from cluster.attention_replica import AttentionReplica
from cluster.epoch_thread import EpochEnd
from cluster.logs import configure_logging
from cluster.rank_agent import RankAgent
from cluster.request import GenerationRequest, ReplicaLoad, StepOutput
from cluster.spec import CellSpec
from cluster.topology import Role
from model_shards.errors import UnavailableError


class AttentionRank:
    """One attention replica. Constructed means in an epoch: Serve routes to it only then."""

    async def __init__(self, spec: CellSpec) -> None:  # type: ignore[misc]  # Serve awaits it
        uid = f"attention-{uuid.uuid4().hex}"
        configure_logging(Role.ATTENTION.value, uid[:16], spec.log_level)
        coordinator = get_or_create_coordinator(spec)
        client = RayCoordinatorClient(coordinator)
        started = coordinator.start.remote()
        loop = asyncio.get_running_loop()
        progress = LoadingReporter(client, loop, uid[:12])
        agent: RankAgent | None = None

        def epoch_ended(end: EpochEnd) -> None:
            if agent is not None:
                loop.call_soon_threadsafe(agent.epoch_ended, end)

        # Under Ray each rank sees its own GPU only, as number 0.
        # Rank 0 serves the rendezvous where the other nodes reach it; on one machine Ray itself stays on loopback.
        spec = dataclasses.replace(spec, host=ray.util.get_node_ip_address())
        replica = await asyncio.to_thread(AttentionReplica, spec, 0, loop, epoch_ended, spec.join_timeout_s, progress)
        self._replica = replica
        agent = RankAgent(client, uid, Role.ATTENTION, None, replica, replica)
        self._agent_task = loop.create_task(agent.run())
        await asyncio.wait_for(started, spec.join_timeout_s)
        try:
            await asyncio.wait_for(agent.first_joined.wait(), spec.join_timeout_s)
        except TimeoutError:
            status = await client.status()
            raise UnavailableError(
                f"this attention replica joined no epoch within {spec.join_timeout_s:g} s; "
                f"missing ranks: {', '.join(status.missing) or 'none'}; last error: {status.last_error or 'none'}"
            ) from None

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[StepOutput, None]:
        """See AttentionReplica.generate."""
        async with aclosing(self._replica.generate(request)) as outputs:
            async for output in outputs:
                yield output

    async def load(self) -> ReplicaLoad:
        """See AttentionReplica.load."""
        return self._replica.load()

    async def check_health(self) -> None:
        """Serve asks now and then; raises when the control side died, so that Serve replaces this replica."""
        if self._agent_task.done():
            raise UnavailableError("the rank agent stopped; the replica must be replaced")

    async def __del__(self) -> None:
        """Serve calls this when it takes the replica down, after its requests ended."""
        self._agent_task.cancel()
        await asyncio.to_thread(self._replica.close)


AttentionDeployment = serve.deployment(name="attention")(AttentionRank)
