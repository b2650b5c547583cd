"""The Ray Serve shell of an attention rank."""

import asyncio
import dataclasses
import uuid
from collections.abc import Awaitable

import ray
from ray import serve

from cluster.actors.client import RayCoordinatorClient
from cluster.actors.coordinator import get_or_create_coordinator
from cluster.actors.progress import LoadingReporter
from cluster.attention_replica import AttentionReplica
from cluster.control import Registration
from cluster.epoch_thread import EpochEnd
from cluster.link.hub import OutputHub
from cluster.link.wire import StreamAddress
from cluster.logs import configure_logging
from cluster.rank_agent import RankAgent
from cluster.request import GenerationRequest, ReplicaLoad
from cluster.spec import CellSpec
from cluster.topology import Role
from model_shards.errors import UnavailableError

# A rank without a place goes by the begin of its uid.
_NAME_LENGTH = len("attention-") + 8


class AttentionRank:
    """One attention replica. Constructed means in an epoch: Serve routes to it only then."""

    async def __init__(self, spec: CellSpec) -> None:  # type: ignore[misc]  # Serve awaits it
        identity = Registration(f"{Role.ATTENTION.value}-{uuid.uuid4().hex}", Role.ATTENTION, None)
        name = identity.uid[:_NAME_LENGTH]
        self._log_level = spec.log_level
        self._agent_task: asyncio.Task[None] | None = None
        self._log_as(name)
        coordinator = get_or_create_coordinator(spec)
        client = RayCoordinatorClient(coordinator)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + spec.load_timeout_s + spec.join_timeout_s
        started = coordinator.start.remote()
        progress = LoadingReporter(client, loop, identity.uid, name)
        agent: RankAgent | None = None

        def epoch_ended(end: EpochEnd) -> None:
            if agent is not None:
                loop.call_soon_threadsafe(agent.epoch_ended, end)

        # Under Ray each rank sees its own GPU only, as number 0.
        # Rank 0 serves the rendezvous where the other nodes reach it; on one machine Ray itself stays on loopback.
        spec = dataclasses.replace(spec, host=ray.util.get_node_ip_address())
        # A lost expert shard loads its slice anew before the next epoch is joined.
        rejoin_timeout_s = spec.load_timeout_s + spec.join_timeout_s
        replica = await asyncio.to_thread(AttentionReplica, spec, 0, loop, epoch_ended, rejoin_timeout_s, progress)
        self._replica = replica
        self._hub = OutputHub(replica)
        self._agent = agent = RankAgent(client, identity, replica, replica, self._log_as)
        self._agent_task = loop.create_task(agent.run())
        try:
            async with asyncio.timeout_at(deadline):
                await started
                await _first_of(agent.first_joined.wait(), self._agent_task)
        except TimeoutError:
            await self._leave()
            raise UnavailableError(await _why_in_no_epoch(name, spec, client)) from None
        except BaseException:
            await self._leave()
            raise

    async def run(self, request: GenerationRequest, destination: StreamAddress) -> None:
        """See OutputHub.run."""
        await self._hub.run(request, destination)

    async def load(self) -> ReplicaLoad:
        """See AttentionReplica.load."""
        return self._replica.load()

    async def check_health(self) -> None:
        """Serve asks now and then; raises when the control side died, so that Serve replaces this replica."""
        if self._agent_task is None or self._agent_task.done():
            raise UnavailableError("the rank agent stopped; the replica must be replaced")

    async def __del__(self) -> None:
        """Serve calls this when it takes the replica down, after its requests ended; also when it was half built."""
        await self._leave()

    async def _leave(self) -> None:
        if self._agent_task is None:
            return
        self._agent_task.cancel()
        # Before the epoch is left: else the next one would be built with this replica, which does not join it.
        await self._agent.unregister()
        await self._replica.close()
        self._hub.close()

    def _log_as(self, name: str) -> None:
        configure_logging(Role.ATTENTION.value, name, self._log_level)


async def _first_of(joined: Awaitable[object], agent: "asyncio.Task[None]") -> None:
    """Waits for the first epoch. Raises what the agent ended with, if that comes first: without it none will come."""
    waiting = asyncio.ensure_future(joined)
    try:
        await asyncio.wait((waiting, agent), return_when=asyncio.FIRST_COMPLETED)
        if agent.done():
            agent.result()
    finally:
        waiting.cancel()


async def _why_in_no_epoch(name: str, spec: CellSpec, client: RayCoordinatorClient) -> str:
    status = await client.status()
    return (
        f"{name} joined no epoch within cell.load_timeout_s ({spec.load_timeout_s:g}) and cell.join_timeout_s "
        f"({spec.join_timeout_s:g}); missing ranks: {', '.join(status.missing) or 'none'}; "
        f"last error: {status.last_error or 'none'}"
    )


AttentionDeployment = serve.deployment(name="attention")(AttentionRank)
