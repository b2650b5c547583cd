"""Who is registered with the coordinator, and who holds which place of the cell. Plain data; the clock is the caller's.

place    0 .. M-1            M .. M+N-1
held by  any attention rank  the expert rank made for that slice; a later one takes the place from its predecessor
others   stand by: they take the first attention place that becomes free
"""

import asyncio
from dataclasses import dataclass, field

from cluster.control import Command, RankStatus, Registration
from cluster.topology import Role, Topology

_STANDBY = "standby"


@dataclass(eq=False)
class Rank:
    """One registered rank; the same object for as long as its process stays registered."""

    registration: Registration
    last_seen: float
    mailbox: "asyncio.Queue[Command]" = field(default_factory=asyncio.Queue)
    commanded_epoch: int = 0  # the last epoch it was told to join
    joined_epoch: int = 0
    ended_epoch: int = 0

    @property
    def uid(self) -> str:
        """Unique per process life."""
        return self.registration.uid

    @property
    def is_busy(self) -> bool:
        """Whether it joins or runs an epoch, as far as it has told."""
        return self.ended_epoch < self.commanded_epoch

    def hear(self, registration: Registration, now: float) -> None:
        """Takes in what a rank says of itself when it registers, for the first time or again."""
        self.registration = registration
        self.last_seen = now
        # A question of before that is still open has nobody who waits for the answer: it must not get a command.
        pending, self.mailbox = self.mailbox, asyncio.Queue()
        while not pending.empty():
            self.mailbox.put_nowait(pending.get_nowait())
        if self.mailbox.empty() and registration.highest_epoch < self.commanded_epoch:
            # Its last Join was lost on the way, so it will never speak of that epoch.
            self.ended_epoch = max(self.ended_epoch, self.commanded_epoch)
        self.commanded_epoch = max(self.commanded_epoch, registration.highest_epoch)
        self.ended_epoch = max(self.ended_epoch, registration.ended_epoch)
        if registration.membership is not None:
            self.joined_epoch = max(self.joined_epoch, registration.membership.epoch)


class Roster:
    """The ranks and the places of one topology."""

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        self._ranks: dict[str, Rank] = {}
        self._places: list[str | None] = [None] * topology.world_size

    def register(self, registration: Registration, now: float) -> Rank:
        """Takes a rank in, or hears a known one again; it gets its place, a free attention place, or stands by."""
        rank = self._ranks.get(registration.uid)
        if rank is None:
            rank = self._ranks[registration.uid] = Rank(registration, now)
        rank.hear(registration, now)
        self._seat(rank)
        return rank

    def get(self, uid: str) -> Rank | None:
        """The registered rank of that uid."""
        return self._ranks.get(uid)

    def is_here(self, rank: Rank) -> bool:
        """Whether it is still registered: neither dropped nor replaced."""
        return self._ranks.get(rank.uid) is rank

    def drop(self, uid: str) -> None:
        """Forgets a rank; a standby takes its place."""
        self._ranks.pop(uid, None)
        self._places = [None if held == uid else held for held in self._places]
        for rank in self._ranks.values():
            self._seat(rank)

    def put(self, rank: Rank, place: int) -> None:
        """Gives a rank the attention place that it had under an earlier coordinator; who holds it gets another."""
        displaced = self._places[place]
        self._places = [None if held == rank.uid else held for held in self._places]
        self._places[place] = rank.uid
        if displaced is not None and displaced != rank.uid:
            self._seat(self._ranks[displaced])

    def members(self) -> list[Rank]:
        """The ranks that hold a place, in order of global rank."""
        return [self._ranks[uid] for uid in self._places if uid is not None]

    def missing(self) -> tuple[str, ...]:
        """Names of the places without a rank."""
        return tuple(self._topology.name(place) for place, uid in enumerate(self._places) if uid is None)

    def has_place(self, uid: str) -> bool:
        """Whether a rank holds a place."""
        return uid in self._places

    def name_of(self, uid: str) -> str:
        """`A0`; "standby" for one without a place."""
        return self._topology.name(self._places.index(uid)) if uid in self._places else _STANDBY

    def silent(self, since: float) -> list[str]:
        """Ranks that were last heard of before `since`."""
        return [uid for uid, rank in self._ranks.items() if rank.last_seen < since]

    def statuses(self, now: float) -> tuple[RankStatus, ...]:
        """One entry per rank."""
        # Not `name_of`, which searches all places for each.
        names = {uid: self._topology.name(place) for place, uid in enumerate(self._places) if uid is not None}
        return tuple(
            RankStatus(names.get(uid, _STANDBY), uid, now - rank.last_seen) for uid, rank in self._ranks.items()
        )

    def _seat(self, rank: Rank) -> None:
        registration = rank.registration
        if registration.role is Role.EXPERT:
            assert registration.ep_rank is not None, "an expert rank is made for one slice"
            place = self._topology.expert_global_rank(registration.ep_rank)
            predecessor = self._places[place]
            if predecessor is not None and predecessor != rank.uid:
                # An expert rank registers for a held place only when its predecessor's process is gone.
                self._ranks.pop(predecessor, None)
            self._places[place] = rank.uid
        elif rank.uid not in self._places:
            free = [place for place in range(self._topology.num_attention) if self._places[place] is None]
            if free:
                self._places[free[0]] = rank.uid
