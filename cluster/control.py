"""Messages between the coordinator and the ranks. Ranks call, the coordinator answers: it never calls a rank.

rank                                    coordinator
 | register(registration) ----------------> |
 | next_command(uid) <----- OpenRendezvous- |   rank 0 only
 | rendezvous_opened(uid, epoch, where) --> |
 | next_command(uid) <--------------- Join- |   every member
 | joined(uid, epoch) --------------------> |   all joined: the epoch runs
 | next_command(uid) <-------------- Leave- |   end at the next step boundary, or cut the join short
 | epoch_ended(uid, epoch, error, fault) -> |
 | unregister(uid) -----------------------> |   before it leaves for good
"""

from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from cluster.membership import Membership, Rendezvous
from cluster.topology import Role


@dataclass(frozen=True)
class Registration:
    """A rank that has its weights loaded and waits for an epoch, or joins or runs one.

    Sent again when the coordinator did not answer: it may be another one now, or have missed what was reported.
    """

    uid: str  # unique per process life
    role: Role
    ep_rank: int | None  # expert ranks are made for one slice; attention ranks take any free place
    membership: Membership | None = None  # the epoch it runs, if any
    global_rank: int | None = None
    highest_epoch: int = 0  # the newest epoch it was told to join
    ended_epoch: int = 0  # the newest epoch it left


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
    """End this epoch at its next step boundary, or give up joining it, and report."""

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

    uid: str  # what it will register as
    name: str  # "E0"; an attention rank has no place yet and goes by the begin of its uid
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
    damage: tuple[str, ...] = ()  # what ranks that cannot start found wrong with their files


class CoordinatorClient(Protocol):
    """How a rank reaches the coordinator; every call may raise UnavailableError, and is then tried again."""

    async def register(self, registration: Registration) -> None: ...

    async def next_command(self, uid: str, timeout_s: float) -> Command | None: ...

    async def rendezvous_opened(self, uid: str, epoch: int, rendezvous: Rendezvous) -> None: ...

    async def joined(self, uid: str, epoch: int) -> None: ...

    async def epoch_ended(self, uid: str, epoch: int, error: str | None, is_fault: bool) -> None: ...

    async def unregister(self, uid: str) -> None: ...
