"""Messages between the coordinator and the ranks. Ranks call, the coordinator answers: it never calls a rank.

rank                                   coordinator
 | register(registration) ---------------> |
 | next_command(uid) <---- OpenRendezvous- |   rank 0 only
 | rendezvous_opened(uid, epoch, where) -> |
 | next_command(uid) <-------------- Join- |   every member
 | joined(uid, epoch) -------------------> |   all joined: the epoch runs
 | next_command(uid) <------------- Leave- |   end at the next step boundary
 | epoch_ended(uid, epoch, error) -------> |
"""

from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from cluster.membership import Membership, Rendezvous
from cluster.topology import Role


@dataclass(frozen=True)
class Registration:
    """A rank that has its weights loaded and waits for an epoch, or still runs one (after a coordinator restart)."""

    uid: str  # unique per process life
    role: Role
    ep_rank: int | None  # expert ranks are made for one slice; attention ranks take any free place
    membership: Membership | None = None  # the epoch it still runs, if any
    global_rank: int | None = None


@dataclass(frozen=True)
class OpenRendezvous:
    """Serve the store of this epoch and report where."""

    epoch: int


@dataclass(frozen=True)
class Join:
    """Join this epoch as this rank."""

    membership: Membership
    global_rank: int


@dataclass(frozen=True)
class Leave:
    """End this epoch at its next step boundary and report."""

    epoch: int


Command = OpenRendezvous | Join | Leave


class CellState(Enum):
    """What the coordinator is doing."""

    WAITING = "waiting"  # for ranks to register
    FORMING = "forming"  # an epoch
    RUNNING = "running"
    ENDING = "ending"  # an epoch, after an abort or for a change


@dataclass(frozen=True)
class RankStatus:
    """One registered rank."""

    name: str  # "A0"; "standby" when it has no place
    uid: str
    last_seen_s: float  # seconds since its last call


@dataclass(frozen=True)
class LoadingStatus:
    """Progress of one rank that loads its weights."""

    name: str
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class CellStatus:
    """What `shoal status` and the start-up display show."""

    state: CellState
    epoch: int
    missing: tuple[str, ...]  # places without a rank
    ranks: tuple[RankStatus, ...]
    loading: tuple[LoadingStatus, ...]
    last_error: str | None


class CoordinatorClient(Protocol):
    """How a rank reaches the coordinator; every call may raise UnavailableError, and is then tried again."""

    async def register(self, registration: Registration) -> None: ...

    async def next_command(self, uid: str, timeout_s: float) -> Command | None: ...

    async def rendezvous_opened(self, uid: str, epoch: int, rendezvous: Rendezvous) -> None: ...

    async def joined(self, uid: str, epoch: int) -> None: ...

    async def epoch_ended(self, uid: str, epoch: int, error: str | None) -> None: ...
