"""The coordinator: who is in the cell, and the epochs that follow from it. Plain asyncio; its clock is given.

    WAITING --all places taken--> FORMING --all joined--> RUNNING
       ^                            | deadline, failure      | abort reported, a rank silent or replaced
       +------- places of lost ranks are free <-- ENDING <---+

The data path never waits for the coordinator: an epoch runs on without it.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from cluster.control import (
    CellState,
    CellStatus,
    Command,
    Join,
    Leave,
    LoadingStatus,
    OpenRendezvous,
    RankStatus,
    Registration,
)
from cluster.logs import log_event
from cluster.membership import Membership, Rendezvous
from cluster.rank_agent import POLL_S
from cluster.topology import Role, Topology
from model_shards.errors import UnavailableError
from model_shards.placement import ExpertPlacement

logger = logging.getLogger(__name__)

# A rank asks every POLL_S; one that missed two questions is lost.
SILENCE_S = 2.5 * POLL_S
_ROLL_CALL_S = 15.0
_RETRY_S = 1.0


@dataclass
class _Rank:
    registration: Registration
    last_seen: float
    mailbox: "asyncio.Queue[Command]" = field(default_factory=asyncio.Queue)
    commanded_epoch: int = 0  # the last epoch it was told to join
    joined_epoch: int = 0
    ended_epoch: int = 0


class Coordinator:
    """Forms epochs of a fixed topology out of the ranks that register. All methods run on one event loop."""

    def __init__(
        self,
        topology: Topology,
        placement: ExpertPlacement,
        backend: str,
        join_timeout_s: float,
        exchange_timeout_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._topology = topology
        self._placement = placement
        self._backend = backend
        self._join_timeout_s = join_timeout_s
        self._exchange_timeout_s = exchange_timeout_s
        self._clock = clock
        self._ranks: dict[str, _Rank] = {}
        self._places: list[str | None] = [None] * topology.world_size
        self._state = CellState.WAITING
        self._epoch = 0
        self._rendezvous: Rendezvous | None = None
        self._loading: dict[str, LoadingStatus] = {}
        self._last_error: str | None = None
        self._changed = asyncio.Condition()

    # What ranks call: CoordinatorClient.

    async def register(self, registration: Registration) -> None:
        """Takes a rank in; it gets its place, a free attention place, or stands by."""
        async with self._changed:
            rank = _Rank(registration, self._clock())
            self._ranks[registration.uid] = rank
            self._take_place(registration)
            if registration.membership is not None:
                self._adopt(rank, registration.membership)
            log_event(logger, "rank registered", uid=registration.uid, place=self._name_of(registration.uid))
            self._changed.notify_all()

    async def next_command(self, uid: str, timeout_s: float) -> Command | None:
        """The next command for a rank, or None after `timeout_s`. Raises UnavailableError for one not registered."""
        rank = self._seen(uid)
        try:
            return await asyncio.wait_for(rank.mailbox.get(), timeout_s)
        except TimeoutError:
            return None
        finally:
            rank.last_seen = self._clock()

    async def rendezvous_opened(self, uid: str, epoch: int, rendezvous: Rendezvous) -> None:
        """Rank 0 serves the store of `epoch`."""
        self._seen(uid)
        async with self._changed:
            if epoch == self._epoch:
                self._rendezvous = rendezvous
                self._changed.notify_all()

    async def joined(self, uid: str, epoch: int) -> None:
        """A rank's process groups stand."""
        rank = self._seen(uid)
        async with self._changed:
            rank.joined_epoch = max(rank.joined_epoch, epoch)
            self._changed.notify_all()

    async def epoch_ended(self, uid: str, epoch: int, error: str | None) -> None:
        """A rank left an epoch: in order, or because it was aborted there."""
        rank = self._seen(uid)
        async with self._changed:
            rank.ended_epoch = max(rank.ended_epoch, epoch)
            if error is not None:
                self._last_error = f"{self._name_of(uid)}: {error}"
            if epoch == self._epoch and self._state is CellState.RUNNING:
                self._state = CellState.ENDING
            self._changed.notify_all()

    # What the shells and the start-up display call.

    def report_loading(self, loading: LoadingStatus) -> None:
        """Progress of a rank that is not registered yet."""
        self._loading[loading.name] = loading

    def report_failure(self, name: str, error: str) -> None:
        """A rank that is not registered cannot start; told to whoever waits for the cell."""
        log_event(logger, "rank cannot start", logging.ERROR, place=name, error=error)
        self._last_error = f"{name}: {error}"

    def status(self) -> CellStatus:
        """A snapshot."""
        now = self._clock()
        ranks = tuple(RankStatus(self._name_of(uid), uid, now - rank.last_seen) for uid, rank in self._ranks.items())
        loading = tuple(self._loading.values())
        return CellStatus(self._state, self._epoch, self._missing(), ranks, loading, self._last_error)

    async def wait_running(self, timeout_s: float) -> CellStatus:
        """Returns once an epoch runs. Raises UnavailableError naming what is missing when the time is up."""
        try:
            async with asyncio.timeout(timeout_s), self._changed:
                await self._changed.wait_for(lambda: self._state is CellState.RUNNING)
        except TimeoutError:
            missing = ", ".join(self._missing()) or "none"
            raise UnavailableError(
                f"the cell did not form within {timeout_s:g} s: state {self._state.value}, missing ranks: {missing}, "
                f"last error: {self._last_error or 'none'}"
            ) from None
        return self.status()

    async def run(self) -> None:
        """Forms epochs, for ever; run it as one task."""
        while True:
            await self._until(lambda: self._state is not CellState.RUNNING and not self._missing(), POLL_S)
            self._drop_silent()
            if self._state is CellState.ENDING:
                await self._roll_call()
            elif self._state is CellState.WAITING and not self._missing():
                held = [self._ranks[uid] for uid in self._places if uid is not None]
                if any(rank.joined_epoch > rank.ended_epoch for rank in held):
                    # An epoch of before this coordinator's start still runs on some: they must leave it first.
                    await self._roll_call()
                else:
                    await self._form()

    # Policy.

    async def _form(self) -> None:
        """Builds the next epoch; on failure the cell is WAITING again, without the ranks that did not answer."""
        self._epoch += 1
        self._state = CellState.FORMING
        self._rendezvous = None
        epoch = self._epoch
        members = [self._ranks[uid] for uid in self._places if uid is not None]
        members[0].mailbox.put_nowait(OpenRendezvous(epoch))
        if not await self._until(lambda: self._rendezvous is not None, _ROLL_CALL_S) or self._rendezvous is None:
            await self._failed_to_form(members[:1], f"A0 did not open the rendezvous of epoch {epoch}")
            return
        membership = Membership(
            epoch,
            self._topology,
            self._placement,
            self._rendezvous,
            self._backend,
            self._join_timeout_s,
            self._exchange_timeout_s,
        )
        for global_rank, member in enumerate(members):
            member.commanded_epoch = epoch
            member.mailbox.put_nowait(Join(membership, global_rank))
        # The ranks' own deadline names who is missing; this one only catches ranks that died while joining.
        await self._until(
            lambda: all(m.joined_epoch == epoch or m.ended_epoch == epoch for m in members),
            self._join_timeout_s + _ROLL_CALL_S,
        )
        if all(m.joined_epoch == epoch and m.ended_epoch < epoch for m in members):
            async with self._changed:
                self._state = CellState.RUNNING
                self._last_error = None
                self._changed.notify_all()
            log_event(logger, "epoch running", epoch=epoch, ranks=len(members))
            return
        silent = [m for m in members if m.joined_epoch < epoch and m.ended_epoch < epoch]
        await self._failed_to_form(silent, f"not all ranks joined epoch {epoch}")

    async def _failed_to_form(self, lost: list[_Rank], error: str) -> None:
        log_event(logger, "epoch failed to form", logging.ERROR, epoch=self._epoch, error=error)
        self._last_error = self._last_error or error
        for rank in lost:
            self._drop(rank.registration.uid)
        self._state = CellState.ENDING
        await asyncio.sleep(_RETRY_S)

    async def _roll_call(self) -> None:
        """Asks every member to leave the epoch; who does not answer is lost and frees its place."""
        epoch = self._epoch
        members = [self._ranks[uid] for uid in self._places if uid is not None]
        for member in members:
            if member.ended_epoch < epoch and member.commanded_epoch == epoch:
                member.mailbox.put_nowait(Leave(epoch))
        await self._until(lambda: all(m.ended_epoch >= m.commanded_epoch for m in members), _ROLL_CALL_S)
        for member in members:
            if member.ended_epoch < member.commanded_epoch:
                log_event(logger, "rank lost", logging.WARNING, uid=member.registration.uid)
                self._drop(member.registration.uid)
        self._state = CellState.WAITING

    def _drop_silent(self) -> None:
        now = self._clock()
        silent = [uid for uid, rank in self._ranks.items() if now - rank.last_seen > SILENCE_S]
        for uid in silent:
            log_event(logger, "rank silent", logging.WARNING, uid=uid, place=self._name_of(uid))
            if uid in self._places and self._state is CellState.RUNNING:
                self._state = CellState.ENDING
            self._drop(uid)

    def _drop(self, uid: str) -> None:
        self._ranks.pop(uid, None)
        self._places = [None if held == uid else held for held in self._places]
        standbys = [rank.registration for other, rank in self._ranks.items() if other not in self._places]
        for registration in standbys:
            self._take_place(registration)

    def _take_place(self, registration: Registration) -> None:
        if registration.role is Role.EXPERT and registration.ep_rank is not None:
            place = self._topology.expert_global_rank(registration.ep_rank)
            old = self._places[place]
            if old is not None and old != registration.uid:
                # An expert rank registers for a held place only when its predecessor's process is gone.
                self._ranks.pop(old, None)
                if self._state is CellState.RUNNING:
                    self._state = CellState.ENDING
            self._places[place] = registration.uid
            return
        if registration.uid in self._places:
            return
        free = [p for p in range(self._topology.num_attention) if self._places[p] is None]
        if free:
            self._places[free[0]] = registration.uid

    def _adopt(self, rank: _Rank, membership: Membership) -> None:
        """After a coordinator restart: a rank still runs an epoch; take it over when all its members are back."""
        if membership.epoch < self._epoch or self._state not in (CellState.WAITING, CellState.RUNNING):
            return
        self._epoch = membership.epoch
        rank.commanded_epoch = rank.joined_epoch = membership.epoch
        place = rank.registration.global_rank
        if rank.registration.role is Role.ATTENTION and place is not None:
            self._places = [None if held == rank.registration.uid else held for held in self._places]
            self._places[place] = rank.registration.uid
        held = [self._ranks[uid] for uid in self._places if uid is not None]
        if not self._missing() and all(member.joined_epoch == membership.epoch for member in held):
            self._state = CellState.RUNNING

    def _missing(self) -> tuple[str, ...]:
        return tuple(self._topology.name(place) for place, uid in enumerate(self._places) if uid is None)

    def _name_of(self, uid: str) -> str:
        return self._topology.name(self._places.index(uid)) if uid in self._places else "standby"

    def _seen(self, uid: str) -> _Rank:
        rank = self._ranks.get(uid)
        if rank is None:
            raise UnavailableError(f"rank {uid} is not registered with this coordinator; register again")
        rank.last_seen = self._clock()
        return rank

    async def _until(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        try:
            async with asyncio.timeout(timeout_s), self._changed:
                await self._changed.wait_for(condition)
        except TimeoutError:
            return condition()
        return True
