"""The control side of a rank: registers with the coordinator, carries out its commands, reports what happened."""

import asyncio
import dataclasses
import logging
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import Protocol

from cluster.control import Command, CoordinatorClient, Join, Leave, OpenRendezvous, Registration
from cluster.epoch_thread import EpochEnd
from cluster.logs import log_event
from cluster.membership import Membership, Rendezvous
from model_shards.errors import ShoalError, UnavailableError

logger = logging.getLogger(__name__)

POLL_S = 10.0  # how long one question for a command may stay open
_RETRY_S = 1.0


class RankRuntime(Protocol):
    """What an agent steers: an AttentionReplica or an ExpertShard."""

    def join(self, membership: Membership, global_rank: int) -> "Future[None]": ...

    def leave(self, epoch: int) -> None: ...


class RendezvousHost(Protocol):
    """What an agent of an attention rank can also do."""

    def open_rendezvous(self, epoch: int) -> Rendezvous: ...


class RankAgent:
    """Runs on the event loop of its process. `run` returns only when cancelled."""

    def __init__(
        self,
        client: CoordinatorClient,
        identity: Registration,
        runtime: RankRuntime,
        rendezvous_host: RendezvousHost | None,
        on_place: Callable[[str], None],
    ) -> None:
        """`identity` is the registration of a rank in no epoch; `on_place` gets the rank's name ("A0") at each join."""
        self._client = client
        self._identity = identity
        self._uid = identity.uid
        self._runtime = runtime
        self._rendezvous_host = rendezvous_host
        self._on_place = on_place
        self._current: Join | None = None  # told to join, and not ended yet
        self._is_joined = False
        self._highest_epoch = 0  # told to join
        self._ended_epoch = 0
        self._has_left = False
        self._reports: set[asyncio.Task[None]] = set()
        self.first_joined = asyncio.Event()

    def epoch_ended(self, end: EpochEnd) -> None:
        """Call on the event loop when the rank's thread left an epoch."""
        self._ended_epoch = max(self._ended_epoch, end.epoch)
        if self._current is not None and self._current.membership.epoch == end.epoch:
            self._current = None
            self._is_joined = False
        self._report_end(end)

    async def unregister(self) -> None:
        """Gives the place up for good: cancel `run`, call this, and only then leave the epoch.

        A coordinator that is away learns of it by this rank's silence.
        """
        self._has_left = True
        await self._tell(self._client.unregister(self._uid))

    async def run(self) -> None:
        """Registers and serves commands, for ever; a coordinator that is away is waited for."""
        registered = False
        while True:
            try:
                if not registered:
                    await self._client.register(self._registration())
                    registered = True
                command = await self._client.next_command(self._uid, POLL_S)
            except UnavailableError as error:
                registered = False
                log_event(logger, "coordinator away", logging.WARNING, error=str(error))
                await asyncio.sleep(_RETRY_S)
                continue
            if command is not None:
                await self._carry_out(command)

    def _registration(self) -> Registration:
        told = dataclasses.replace(self._identity, highest_epoch=self._highest_epoch, ended_epoch=self._ended_epoch)
        current = self._current
        if current is None or not self._is_joined:
            return told
        return dataclasses.replace(told, membership=current.membership, global_rank=current.global_rank)

    async def _carry_out(self, command: Command) -> None:
        match command:
            case OpenRendezvous(epoch):
                if self._rendezvous_host is None:
                    raise UnavailableError(f"rank {self._uid} cannot serve a rendezvous: it is an expert rank")
                rendezvous = self._rendezvous_host.open_rendezvous(epoch)
                await self._tell(self._client.rendezvous_opened(self._uid, epoch, rendezvous))
            case Join(membership, global_rank):
                self._current = command
                self._is_joined = False
                self._highest_epoch = max(self._highest_epoch, membership.epoch)
                self._on_place(membership.topology.name(global_rank))
                future = self._runtime.join(membership, global_rank)
                self._watch_join(membership.epoch, future)
            case Leave(epoch):
                # A late word about an older epoch must not end the one that runs.
                if self._current is not None and self._current.membership.epoch == epoch:
                    self._runtime.leave(epoch)
                else:
                    # It is over here: the report of that did not arrive.
                    self._report_end(EpochEnd(epoch, None, is_fault=False))

    def _report_end(self, end: EpochEnd) -> None:
        if not self._has_left:
            report = self._client.epoch_ended(self._uid, end.epoch, end.error, end.is_fault)
            self._keep(asyncio.get_running_loop().create_task(self._tell(report)))

    def _watch_join(self, epoch: int, future: "Future[None]") -> None:
        async def wait() -> None:
            try:
                await asyncio.wrap_future(future)
            except ShoalError as error:
                # `epoch_ended` reports it to the coordinator; here only the log learns of it.
                log_event(logger, "join failed", logging.WARNING, epoch=epoch, error=str(error))
                return
            if self._current is not None and self._current.membership.epoch == epoch:
                self._is_joined = True
            self.first_joined.set()
            await self._tell(self._client.joined(self._uid, epoch))

        self._keep(asyncio.get_running_loop().create_task(wait()))

    def _keep(self, task: "asyncio.Task[None]") -> None:
        self._reports.add(task)
        task.add_done_callback(self._reports.discard)

    async def _tell(self, call: Awaitable[None]) -> None:
        try:
            await call
        except UnavailableError as error:
            # The coordinator restarts and asks anew: registration carries all it must know.
            log_event(logger, "report not delivered", logging.WARNING, error=str(error))
