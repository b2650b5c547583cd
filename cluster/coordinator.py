"""The coordinator: who is in the cell, and the epochs that follow from it. Plain asyncio; its clock is given.

    WAITING --all places taken--> FORMING --all joined--> RUNNING
       ^                            | deadline, failure      | abort reported, a rank silent or replaced
       +------- places of lost ranks are free <-- ENDING <---+

The data path never waits for the coordinator: an epoch runs on without it.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable

from cluster.backoff import EpochBackoff
from cluster.control import CellState, CellStatus, Command, Join, Leave, LoadingStatus, OpenRendezvous, Registration
from cluster.logs import log_event
from cluster.membership import Membership, Rendezvous
from cluster.rank_agent import POLL_S
from cluster.roster import Rank, Roster
from cluster.topology import Role, Topology
from model_shards.errors import UnavailableError
from model_shards.placement import ExpertPlacement

logger = logging.getLogger(__name__)

# A rank asks every POLL_S; one that missed two questions is lost.
SILENCE_S = 2.5 * POLL_S
_ROLL_CALL_S = 15.0


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
        self._roster = Roster(topology)
        self._backoff = EpochBackoff(clock)
        self._state = CellState.WAITING
        self._epoch = 0
        self._highest_epoch = 0  # that any rank ever heard of; the next one is above it
        self._rendezvous: Rendezvous | None = None
        self._loading: dict[str, LoadingStatus] = {}
        self._last_error: str | None = None
        self._damage: dict[str, str] = {}  # by place
        self._changed = asyncio.Condition()

    # What ranks call: CoordinatorClient.

    async def register(self, registration: Registration) -> None:
        """Takes a rank in; it gets its place, a free attention place, or stands by.

        A rank that is known keeps its place and its commands: it only was not heard for a while.
        """
        async with self._changed:
            self._loading.pop(registration.uid, None)
            self._highest_epoch = max(self._highest_epoch, registration.highest_epoch)
            held = self._roster.members()
            rank = self._roster.register(registration, self._clock())
            self._damage.pop(self._roster.name_of(rank.uid), None)
            has_lost = not all(self._roster.is_here(member) for member in held)
            # It left the epoch that runs, and the report of that did not arrive.
            has_left = self._roster.has_place(rank.uid) and not rank.is_busy
            if self._state is CellState.RUNNING and (has_lost or has_left):
                self._state = CellState.ENDING
            if self._state is CellState.ENDING and rank.is_busy:
                # It may have missed the word of before.
                rank.mailbox.put_nowait(Leave(rank.commanded_epoch))
            if registration.membership is not None:
                self._adopt(rank, registration.membership)
            log_event(logger, "rank registered", uid=rank.uid, place=self._roster.name_of(rank.uid))
            self._changed.notify_all()

    async def unregister(self, uid: str) -> None:
        """A rank leaves for good; call it before it leaves its epoch, so that no other is built with it."""
        async with self._changed:
            if self._roster.get(uid) is not None:
                log_event(logger, "rank leaves", uid=uid, place=self._roster.name_of(uid))
                self._drop(uid)
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

    async def epoch_ended(self, uid: str, epoch: int, error: str | None, is_fault: bool) -> None:
        """A rank left an epoch: in order, because it was aborted there, or by an error of its own (`is_fault`)."""
        rank = self._seen(uid)
        async with self._changed:
            rank.ended_epoch = max(rank.ended_epoch, epoch)
            if error is not None:
                self._last_error = f"{self._roster.name_of(uid)}: {error}"
            if is_fault:
                place = self._roster.name_of(uid)
                log_event(logger, "rank failed", logging.ERROR, place=place, uid=uid, epoch=epoch, error=error)
            if is_fault and epoch == self._epoch:
                self._backoff.epoch_failed(epoch)
            if epoch == self._epoch and self._state is CellState.RUNNING:
                self._state = CellState.ENDING
            self._changed.notify_all()

    # What the shells and the start-up display call.

    def report_loading(self, loading: LoadingStatus) -> None:
        """Progress of a rank that is not registered yet."""
        if self._roster.get(loading.uid) is not None:
            return
        # An expert rank that was started again has another uid and the same name.
        others = {uid: other for uid, other in self._loading.items() if other.name != loading.name}
        self._loading = {**others, loading.uid: loading}

    def report_failure(self, name: str, error: str, is_damage: bool = False) -> None:
        """A rank that is not registered cannot start; told to whoever waits for the cell. `is_damage`: nor will it
        until somebody mends its files."""
        log_event(logger, "rank cannot start", logging.ERROR, place=name, error=error)
        self._last_error = f"{name}: {error}"
        self._damage.pop(name, None)
        if is_damage:
            self._damage[name] = error

    def status(self) -> CellStatus:
        """A snapshot."""
        ranks = self._roster.statuses(self._clock())
        loading = tuple(self._loading.values())
        missing, damage = self._roster.missing(), tuple(self._damage.values())
        return CellStatus(self._state, self._epoch, missing, ranks, loading, self._last_error, damage)

    async def wait_running(self, timeout_s: float) -> CellStatus:
        """Returns once an epoch runs. Raises UnavailableError naming what is missing when the time is up."""
        try:
            async with asyncio.timeout(timeout_s), self._changed:
                await self._changed.wait_for(lambda: self._state is CellState.RUNNING)
        except TimeoutError:
            missing = ", ".join(self._roster.missing()) or "none"
            raise UnavailableError(
                f"the cell did not form within {timeout_s:g} s: state {self._state.value}, missing ranks: {missing}, "
                f"last error: {self._last_error or 'none'}"
            ) from None
        return self.status()

    async def run(self) -> None:
        """Forms epochs, for ever; run it as one task."""
        while True:
            await self._until(self._is_work_to_do, POLL_S)
            if self._state is CellState.ENDING:
                await self._roll_call()
            elif self._is_work_to_do():
                if any(member.is_busy for member in self._roster.members()):
                    # An epoch of before this coordinator's start still runs on some: they must leave it first.
                    await self._roll_call()
                elif pause_s := self._backoff.take():
                    await asyncio.sleep(pause_s)
                else:
                    await self._form()

    # Policy.

    def _is_work_to_do(self) -> bool:
        if self._state is CellState.ENDING:
            return True
        return self._state is CellState.WAITING and not self._roster.missing()

    async def _form(self) -> None:
        """Builds the next epoch; on failure it is ENDING, and the roll call tells who is still there.

        A member that ends the epoch, is replaced or leaves fails it at once: the rest must not wait for their deadline.
        """
        self._epoch = epoch = max(self._epoch, self._highest_epoch) + 1
        self._state = CellState.FORMING
        self._rendezvous = None
        members = self._roster.members()

        def is_gone() -> bool:
            return not all(self._roster.is_here(member) for member in members)

        def is_broken() -> bool:
            return is_gone() or any(member.ended_epoch >= epoch for member in members)

        def is_formed() -> bool:
            return all(member.joined_epoch == epoch for member in members) and not is_broken()

        members[0].mailbox.put_nowait(OpenRendezvous(epoch))
        await self._until(lambda: self._rendezvous is not None or is_gone(), _ROLL_CALL_S)
        if is_gone():
            self._failed_to_form("a rank was lost", is_explained=True)
        elif self._rendezvous is None:
            self._drop(members[0].uid)
            self._failed_to_form("A0 did not open the rendezvous", is_explained=False)
        else:
            self._tell_to_join(members, epoch, self._rendezvous)
            # The ranks' own deadline names who is missing; this one is for a rank that does not keep it.
            await self._until(lambda: is_formed() or is_broken(), self._join_timeout_s + _ROLL_CALL_S)
            if not await self._begin_running(is_formed, len(members)):
                self._failed_to_form("not all ranks joined", is_explained=is_gone())

    def _tell_to_join(self, members: list[Rank], epoch: int, rendezvous: Rendezvous) -> None:
        membership = Membership(
            epoch,
            self._topology,
            self._placement,
            rendezvous,
            self._backend,
            self._join_timeout_s,
            self._exchange_timeout_s,
        )
        for global_rank, member in enumerate(members):
            member.commanded_epoch = epoch
            member.mailbox.put_nowait(Join(membership, global_rank))

    async def _begin_running(self, is_formed: Callable[[], bool], num_ranks: int) -> bool:
        """Whether the epoch runs. Asked under the lock: who waited for it may have brought the end of a rank."""
        async with self._changed:
            if not is_formed():
                return False
            self._state = CellState.RUNNING
            self._last_error = None
            # Whoever still loads says so again in a moment; a process that died while loading never will.
            self._loading.clear()
            self._backoff.epoch_runs()
            self._changed.notify_all()
        log_event(logger, "epoch running", epoch=self._epoch, ranks=num_ranks)
        return True

    def _failed_to_form(self, error: str, is_explained: bool) -> None:
        """`is_explained`: a rank was lost meanwhile, so trying again at once is no repetition."""
        log_event(logger, "epoch failed to form", logging.ERROR, epoch=self._epoch, error=error)
        self._last_error = self._last_error or f"epoch {self._epoch}: {error}"
        if not is_explained:
            self._backoff.epoch_failed(self._epoch)
        self._state = CellState.ENDING

    async def _roll_call(self) -> None:
        """Asks every member to leave its epoch; who does not answer is lost and frees its place."""
        members = self._roster.members()
        for member in members:
            if member.is_busy:
                member.mailbox.put_nowait(Leave(member.commanded_epoch))

        def unheard() -> list[Rank]:
            return [member for member in members if member.is_busy and self._roster.is_here(member)]

        await self._until(lambda: not unheard(), _ROLL_CALL_S)
        for member in unheard():
            log_event(logger, "rank lost", logging.WARNING, place=self._roster.name_of(member.uid), uid=member.uid)
            self._drop(member.uid)
        self._state = CellState.WAITING

    def _drop_silent(self) -> None:
        for uid in self._roster.silent(self._clock() - SILENCE_S):
            log_event(logger, "rank silent", logging.WARNING, place=self._roster.name_of(uid), uid=uid)
            self._drop(uid)

    def _drop(self, uid: str) -> None:
        if self._roster.has_place(uid) and self._state is CellState.RUNNING:
            self._state = CellState.ENDING
        self._roster.drop(uid)

    def _adopt(self, rank: Rank, membership: Membership) -> None:
        """After a coordinator restart: a rank still runs an epoch; take it over when all its members are back."""
        if membership.epoch < self._epoch or self._state is not CellState.WAITING:
            return
        self._epoch = membership.epoch
        if rank.registration.role is Role.ATTENTION and rank.registration.global_rank is not None:
            self._roster.put(rank, rank.registration.global_rank)
        members = self._roster.members()
        runs = [m.is_busy and m.joined_epoch == m.commanded_epoch == self._epoch for m in members]
        if not self._roster.missing() and all(runs):
            self._state = CellState.RUNNING
            self._backoff.epoch_runs()

    def _seen(self, uid: str) -> Rank:
        rank = self._roster.get(uid)
        if rank is None:
            raise UnavailableError(f"rank {uid} is not registered with this coordinator; register again")
        rank.last_seen = self._clock()
        return rank

    async def _until(self, condition: Callable[[], bool], timeout_s: float) -> None:
        """Waits until `condition` holds, asking it after every change. Drops ranks that fall silent meanwhile."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        while True:
            self._drop_silent()
            left_s = deadline - loop.time()
            if condition() or left_s <= 0:
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(left_s, POLL_S)), self._changed:
                    await self._changed.wait_for(condition)
