"""What a rank holds while an epoch lasts: the store, the process groups, the header exchange and the bell."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from cluster.membership import Membership
from cluster.process_group import EpochGroups, open_epoch
from cluster.rendezvous import connect_rendezvous
from cluster.step_header import HeaderExchange
from cluster.wake import WakeBell


@dataclass(frozen=True)
class EpochSession:
    """Lives as long as its epoch; nothing here outlives it."""

    membership: Membership
    groups: EpochGroups
    headers: HeaderExchange
    bell: WakeBell


@contextmanager
def open_session(
    membership: Membership, global_rank: int, device: torch.device, num_micro_batches: int
) -> Iterator[EpochSession]:
    """Joins an epoch. Raises EpochAbortedError naming the missing ranks when the join deadline passes."""
    store = connect_rendezvous(membership.rendezvous, membership.join_timeout_s)
    # Two connections: one blocks while the rank is idle, the other rings.
    ringing = connect_rendezvous(membership.rendezvous, membership.join_timeout_s)
    with open_epoch(membership, global_rank, device, store) as groups:
        headers = HeaderExchange(groups, membership.topology, num_micro_batches)
        yield EpochSession(membership, groups, headers, WakeBell(store, ringing))


class LeaveFlag:
    """Asks the running epoch to end at its next step boundary, waking it if it sleeps. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._asked = False
        self._ring: Callable[[], None] | None = None

    def asked(self) -> bool:
        """Whether this rank wants the epoch to end."""
        return self._asked

    def ask(self) -> None:
        """Sets the flag and wakes the cell."""
        with self._lock:
            self._asked = True
            ring = self._ring
        if ring is not None:
            ring()

    @contextmanager
    def during(self, bell: WakeBell) -> Iterator[None]:
        """Binds the flag to an epoch's bell; the flag starts lowered in each epoch."""
        with self._lock:
            self._asked = False
            self._ring = bell.ring
        try:
            yield
        finally:
            with self._lock:
                self._ring = None
