"""What a rank holds while an epoch lasts: the store, the process groups, the header exchange and the bell."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from cluster.dispatch.trace import ExchangeTrace
from cluster.logs import log_event
from cluster.membership import Membership
from cluster.process_group import EpochGroups, abort_join, open_epoch
from cluster.rendezvous import connect_rendezvous
from cluster.step_header import HeaderExchange
from cluster.wake import WakeBell

logger = logging.getLogger(__name__)

_FOR_GOOD = 1 << 62  # above every epoch


@dataclass(frozen=True)
class EpochSession:
    """Lives as long as its epoch; nothing here outlives it."""

    membership: Membership
    groups: EpochGroups
    headers: HeaderExchange
    bell: WakeBell
    trace: ExchangeTrace | None = None


class LeaveFlag:
    """Asks an epoch to end: at its next step boundary, waking it if it sleeps, or while it is joined.

    A join ends at once where ranks wait for each other; while it connects to the store or to a peer it ends when that
    does, at the join deadline at the latest.

    Thread-safe, except `during` and `interrupt_with`, which are the step thread's.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._left = -1  # epochs up to this one are to be left
        self._epoch = 0
        self._interrupt: Callable[[], None] | None = None

    def asked(self) -> bool:
        """Whether the epoch of `during` is to end."""
        return self._left >= self._epoch

    def ask(self, epoch: int) -> None:
        """Ends `epoch` and older ones, whether they run, are being joined, or come late."""
        with self._lock:
            self._left = max(self._left, epoch)
            interrupt = self._interrupt if self.asked() else None
        if interrupt is not None:
            interrupt()

    def ask_for_good(self) -> None:
        """Ends the epoch of now and every later one."""
        self.ask(_FOR_GOOD)

    @contextmanager
    def during(self, epoch: int) -> Iterator[None]:
        """Inside the block this is the epoch that `asked` speaks of."""
        with self._lock:
            self._epoch = epoch
        try:
            yield
        finally:
            with self._lock:
                self._interrupt = None

    def interrupt_with(self, interrupt: Callable[[], None]) -> None:
        """What to call, from any thread, when the epoch is to end; called now if it is already."""
        with self._lock:
            self._interrupt = interrupt
            late = self.asked()
        if late:
            interrupt()


@contextmanager
def open_session(
    membership: Membership,
    global_rank: int,
    device: torch.device,
    num_micro_batches: int,
    num_moe_layers: int,
    leave: LeaveFlag,
    trace_directory: str | None = None,
) -> Iterator[EpochSession]:
    """Joins an epoch, within the membership's join deadline altogether.

    Raises EpochAbortedError naming the missing ranks when the deadline passes, or the rank that was told to leave.
    """
    deadline = time.monotonic() + membership.join_timeout_s
    store = connect_rendezvous(membership.rendezvous, membership.join_timeout_s)
    # Two connections: one blocks while the rank joins or is idle, the other interrupts and rings.
    ringing = connect_rendezvous(membership.rendezvous, max(deadline - time.monotonic(), 0.1))
    with leave.during(membership.epoch), _traced(membership, global_rank, trace_directory) as trace:
        leave.interrupt_with(partial(abort_join, membership, global_rank, ringing))
        with open_epoch(membership, global_rank, device, store, deadline) as groups:
            headers = HeaderExchange(groups, membership, global_rank, num_micro_batches, num_moe_layers)
            bell = WakeBell(store, ringing)
            leave.interrupt_with(bell.ring)
            yield EpochSession(membership, groups, headers, bell, trace)


@contextmanager
def _traced(membership: Membership, global_rank: int, directory: str | None) -> Iterator[ExchangeTrace | None]:
    """A trace that is written when the epoch is over, after its groups are closed: no peer waits for it."""
    if directory is None:
        yield None
        return
    trace = ExchangeTrace(membership.topology.name(global_rank))
    try:
        yield trace
    finally:
        try:
            trace.write(Path(directory), membership.epoch)
        except OSError as error:
            # Whatever ended the epoch is what its owner must learn, not this.
            log_event(logger, "trace not written", logging.WARNING, directory=directory, error=str(error))
