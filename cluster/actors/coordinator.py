"""The Ray shell of the coordinator: it also makes the expert actors, in one placement group."""

import asyncio
import contextlib
import logging
import time
from pathlib import Path

import ray
from ray.util.placement_group import PlacementGroup, get_placement_group, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.actors.client import COORDINATOR_NAME, NAMESPACE
from cluster.actors.expert import ExpertActor
from cluster.actors.watch import run_for_ever
from cluster.control import CellStatus, Command, LoadingStatus, Registration
from cluster.coordinator import Coordinator
from cluster.logs import configure_logging, log_event
from cluster.membership import Rendezvous
from cluster.spec import CellSpec
from model_shards.config import load_model_config
from model_shards.errors import CapacityError, CheckpointError

logger = logging.getLogger(__name__)

_PLACEMENT_S = 120.0
_EXPERT_RETRY_S = 2.0
_EXPERT_GROUP = "shoal-experts"


def expert_actor_name(ep_rank: int) -> str:
    """The Ray name of an expert actor, in NAMESPACE."""
    return f"shoal-expert-{ep_rank}"


class CoordinatorRank:
    """Forwards to Coordinator."""

    def __init__(self, spec: CellSpec) -> None:
        configure_logging("coordinator", "-", spec.log_level)
        # It warns that detached actors die with their placement group; theirs is detached too.
        logging.getLogger("ray.actor").setLevel(logging.ERROR)
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
        self._started: asyncio.Task[None] | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Makes the expert actors and begins to form epochs; another call waits for the first one, or tries again."""
        if self._started is None or (self._started.done() and self._started.exception() is not None):
            self._started = asyncio.create_task(self._start())
        await asyncio.shield(self._started)

    async def register(self, registration: Registration) -> None:
        await self._coordinator.register(registration)

    async def next_command(self, uid: str, timeout_s: float) -> Command | None:
        return await self._coordinator.next_command(uid, timeout_s)

    async def rendezvous_opened(self, uid: str, epoch: int, rendezvous: Rendezvous) -> None:
        await self._coordinator.rendezvous_opened(uid, epoch, rendezvous)

    async def joined(self, uid: str, epoch: int) -> None:
        await self._coordinator.joined(uid, epoch)

    async def epoch_ended(self, uid: str, epoch: int, error: str | None, is_fault: bool) -> None:
        await self._coordinator.epoch_ended(uid, epoch, error, is_fault)

    async def unregister(self, uid: str) -> None:
        await self._coordinator.unregister(uid)

    async def report_loading(self, loading: LoadingStatus) -> None:
        self._coordinator.report_loading(loading)

    async def status(self) -> CellStatus:
        return self._coordinator.status()

    async def wait_running(self, timeout_s: float) -> CellStatus:
        return await self._coordinator.wait_running(timeout_s)

    async def _start(self) -> None:
        try:
            group = await self._expert_group()
        except CapacityError as error:
            self._coordinator.report_failure("experts", str(error))
            raise
        experts = [self._make_expert(group, ep_rank) for ep_rank in range(self._spec.topology.num_expert)]
        # Last, when nothing can fail any more: whoever calls `start` again must not begin a second time.
        self._tasks = [
            run_for_ever(self._keep_running(actor, ep_rank), f"keep E{ep_rank} running")
            for ep_rank, actor in enumerate(experts)
        ]
        self._tasks.append(run_for_ever(self._coordinator.run(), "form epochs"))

    def _make_expert(self, group: PlacementGroup, ep_rank: int) -> ray.actor.ActorHandle:
        return ExpertActor.options(
            name=expert_actor_name(ep_rank),
            namespace=NAMESPACE,
            # After a restart of this actor they still run, and so does the epoch they are in.
            get_if_exists=True,
            lifetime="detached",
            num_cpus=self._bundle().get("CPU", 0),
            num_gpus=self._bundle().get("GPU", 0),
            max_restarts=-1,
            max_concurrency=16,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=ep_rank),
        ).remote(self._spec, ep_rank, ray.get_runtime_context().current_actor)

    async def _expert_group(self) -> PlacementGroup:
        """The placement group of the experts, one bundle each. Raises CapacityError when the cluster has no room."""
        bundle, count = self._bundle(), self._spec.topology.num_expert
        try:
            group = get_placement_group(_EXPERT_GROUP)
        except ValueError:
            bundles = [dict(bundle) for _ in range(count)]
            group = placement_group(bundles, strategy="PACK", name=_EXPERT_GROUP, lifetime="detached")
        try:
            await asyncio.wait_for(group.ready(), _PLACEMENT_S)
        except TimeoutError:
            raise CapacityError(
                f"the Ray cluster has no room for {count} expert shards of {bundle} each "
                f"within {_PLACEMENT_S:g} s: add nodes or ask for fewer shards"
            ) from None
        return group

    def _bundle(self) -> dict[str, float]:
        """What one expert shard asks of Ray."""
        # A named resource is a place made for a rank: its CPU must not go to whatever else Ray puts on that node.
        place = {"CPU": 1.0} if self._spec.expert_resource is None else {self._spec.expert_resource: 1.0}
        return place if self._spec.device == "cpu" else {**place, "GPU": 1.0}

    async def _keep_running(self, actor: ray.actor.ActorHandle, ep_rank: int) -> None:
        """Runs an expert actor for ever: Ray restarts the process, this starts its work again."""
        while True:
            try:
                await actor.run.remote()
            except ray.exceptions.RayTaskError as error:
                # Its process lives but cannot work, as when its slice cannot be read: told, and tried again.
                name = self._spec.topology.name(self._spec.topology.expert_global_rank(ep_rank))
                self._coordinator.report_failure(name, str(error.cause), isinstance(error.cause, CheckpointError))
            except ray.exceptions.RayError as error:
                log_event(logger, "expert lost", logging.WARNING, place=f"E{ep_rank}", error=type(error).__name__)
            await asyncio.sleep(_EXPERT_RETRY_S)


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


def remove_cell(spec: CellSpec) -> None:
    """Ends the coordinator, the expert actors and their placement group, those of them that exist."""
    names = [COORDINATOR_NAME, *(expert_actor_name(ep_rank) for ep_rank in range(spec.topology.num_expert))]
    for name in names:
        with contextlib.suppress(ValueError):
            ray.kill(ray.get_actor(name, namespace=NAMESPACE), no_restart=True)
    with contextlib.suppress(ValueError):
        remove_placement_group(get_placement_group(_EXPERT_GROUP))
