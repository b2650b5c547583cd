"""The Ray shell of the coordinator: it also makes the expert actors, in one placement group."""

import asyncio
import time
from pathlib import Path

import ray
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.actors.client import COORDINATOR_NAME, NAMESPACE
from cluster.actors.expert import ExpertActor
from cluster.control import CellStatus, Command, LoadingStatus, Registration
from cluster.coordinator import Coordinator
from cluster.logs import configure_logging
from cluster.membership import Rendezvous
from cluster.spec import CellSpec
from model_shards.config import load_model_config
from model_shards.errors import CapacityError

_PLACEMENT_S = 120.0


def expert_actor_name(ep_rank: int) -> str:
    """The Ray name of an expert actor, in NAMESPACE."""
    return f"shoal-expert-{ep_rank}"


class CoordinatorRank:
    """Forwards to Coordinator."""

    def __init__(self, spec: CellSpec) -> None:
        configure_logging("coordinator", "-", spec.log_level)
        config = load_model_config(Path(spec.model_directory))
        self._coordinator = Coordinator(
            spec.topology,
            spec.placement(config),
            spec.backend,
            spec.join_timeout_s,
            spec.exchange_timeout_s,
            time.monotonic,
        )
        self._spec = spec
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Makes the expert actors and begins to form epochs; a second call changes nothing."""
        if self._tasks:
            return
        self._tasks = [asyncio.create_task(self._coordinator.run())]
        await self._make_experts()

    async def register(self, registration: Registration) -> None:
        await self._coordinator.register(registration)

    async def next_command(self, uid: str, timeout_s: float) -> Command | None:
        return await self._coordinator.next_command(uid, timeout_s)

    async def rendezvous_opened(self, uid: str, epoch: int, rendezvous: Rendezvous) -> None:
        await self._coordinator.rendezvous_opened(uid, epoch, rendezvous)

    async def joined(self, uid: str, epoch: int) -> None:
        await self._coordinator.joined(uid, epoch)

    async def epoch_ended(self, uid: str, epoch: int, error: str | None) -> None:
        await self._coordinator.epoch_ended(uid, epoch, error)

    async def report_loading(self, loading: LoadingStatus) -> None:
        self._coordinator.report_loading(loading)

    async def status(self) -> CellStatus:
        return self._coordinator.status()

    async def wait_running(self, timeout_s: float) -> CellStatus:
        return await self._coordinator.wait_running(timeout_s)

    async def _make_experts(self) -> None:
        resources = {"CPU": 1.0} if self._spec.device == "cpu" else {"CPU": 1.0, "GPU": 1.0}
        if self._spec.expert_resource is not None:
            resources[self._spec.expert_resource] = 1.0
        count = self._spec.topology.num_expert
        group = placement_group([dict(resources) for _ in range(count)], strategy="PACK", name="shoal-experts")
        try:
            await asyncio.wait_for(group.ready(), _PLACEMENT_S)
        except TimeoutError:
            raise CapacityError(
                f"the Ray cluster has no room for {count} expert shards of {resources} each "
                f"within {_PLACEMENT_S:g} s: add nodes or ask for fewer shards"
            ) from None
        handle = ray.get_runtime_context().current_actor
        for ep_rank in range(count):
            actor = ExpertActor.options(
                name=expert_actor_name(ep_rank),
                namespace=NAMESPACE,
                get_if_exists=True,
                num_cpus=1,
                num_gpus=0 if self._spec.device == "cpu" else 1,
                max_restarts=-1,
                max_concurrency=16,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=ep_rank),
            ).remote(self._spec, ep_rank, handle)
            self._tasks.append(asyncio.create_task(self._keep_running(actor)))

    async def _keep_running(self, actor: ray.actor.ActorHandle) -> None:
        """Runs an expert actor for ever: Ray restarts the process, this starts its work again."""
        while True:
            try:
                await actor.run.remote()
            except ray.exceptions.RayActorError:
                await asyncio.sleep(1.0)


CoordinatorActor = ray.remote(CoordinatorRank)


def get_or_create_coordinator(spec: CellSpec) -> ray.actor.ActorHandle:
    """The one coordinator of this Ray cluster; whoever comes first makes it."""
    return CoordinatorActor.options(
        name=COORDINATOR_NAME,
        namespace=NAMESPACE,
        get_if_exists=True,
        lifetime="detached",
        num_cpus=0,
        max_restarts=-1,
        max_concurrency=1000,
    ).remote(spec)
