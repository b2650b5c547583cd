"""CoordinatorClient over Ray: every call has a deadline, and a coordinator that is away is an UnavailableError."""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

import ray
from ray.actor import ActorHandle

from cluster.control import CellStatus, Command, LoadingStatus, Registration
from cluster.membership import Rendezvous
from model_shards.errors import UnavailableError

NAMESPACE = "shoal"
COORDINATOR_NAME = "shoal-coordinator"
_CALL_S = 15.0

T = TypeVar("T")


class RayCoordinatorClient:
    """Calls the coordinator actor. Usable from any event loop of a process that is part of the Ray cluster."""

    def __init__(self, actor: ActorHandle) -> None:
        self._actor = actor

    async def register(self, registration: Registration) -> None:
        """See Coordinator.register. A coordinator that was restarted begins its work with this."""
        self._actor.start.remote()
        await self._call(self._actor.register.remote(registration), None)

    async def next_command(self, uid: str, timeout_s: float) -> Command | None:
        """See Coordinator.next_command."""
        command: Command | None = await self._call(self._actor.next_command.remote(uid, timeout_s), timeout_s)
        return command

    async def rendezvous_opened(self, uid: str, epoch: int, rendezvous: Rendezvous) -> None:
        """See Coordinator.rendezvous_opened."""
        await self._call(self._actor.rendezvous_opened.remote(uid, epoch, rendezvous), None)

    async def joined(self, uid: str, epoch: int) -> None:
        """See Coordinator.joined."""
        await self._call(self._actor.joined.remote(uid, epoch), None)

    async def epoch_ended(self, uid: str, epoch: int, error: str | None, is_fault: bool) -> None:
        """See Coordinator.epoch_ended."""
        await self._call(self._actor.epoch_ended.remote(uid, epoch, error, is_fault), None)

    async def unregister(self, uid: str) -> None:
        """See Coordinator.unregister."""
        await self._call(self._actor.unregister.remote(uid), None)

    async def report_loading(self, loading: LoadingStatus) -> None:
        """See Coordinator.report_loading."""
        await self._call(self._actor.report_loading.remote(loading), None)

    async def status(self) -> CellStatus:
        """See Coordinator.status."""
        status: CellStatus = await self._call(self._actor.status.remote(), None)
        return status

    async def wait_running(self, timeout_s: float) -> CellStatus:
        """See Coordinator.wait_running."""
        status: CellStatus = await self._call(self._actor.wait_running.remote(timeout_s), timeout_s)
        return status

    async def _call(self, reference: Awaitable[T], extra_s: float | None) -> T:
        try:
            return await asyncio.wait_for(reference, _CALL_S + (extra_s or 0.0))
        except ray.exceptions.RayActorError as error:
            raise UnavailableError(f"the coordinator is away: {error}") from error
        except TimeoutError:
            raise UnavailableError(f"the coordinator did not answer within {_CALL_S:g} s") from None
