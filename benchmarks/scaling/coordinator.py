"""What the coordinator costs: epoch changes, lost ranks, heartbeats. Simulated ranks on one event loop.

Times are CPU time of the whole loop, the simulated ranks' own part included: it is the same for every rank.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

from benchmarks.scaling.curve import Curve, in_turn
from cluster.control import Command, Registration
from cluster.coordinator import Coordinator
from cluster.membership import Rendezvous
from cluster.rank_agent import RankAgent
from cluster.topology import Role, Topology
from model_shards.placement import contiguous_placement
from tests.fake_ranks import FakeRank, next_running, running

_EXPERTS = 160
_CHANGES = 4  # of which the least is taken


class _Counted:
    """A coordinator as ranks reach it, and how often they did. A command that is handed over is a message, too."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        self.messages = 0

    async def register(self, registration: Registration) -> None:
        self.messages += 1
        await self._coordinator.register(registration)

    async def next_command(self, uid: str, timeout_s: float) -> Command | None:
        self.messages += 1
        return await self._coordinator.next_command(uid, timeout_s)

    async def rendezvous_opened(self, uid: str, epoch: int, rendezvous: Rendezvous) -> None:
        self.messages += 1
        await self._coordinator.rendezvous_opened(uid, epoch, rendezvous)

    async def joined(self, uid: str, epoch: int) -> None:
        self.messages += 1
        await self._coordinator.joined(uid, epoch)

    async def epoch_ended(self, uid: str, epoch: int, error: str | None, is_fault: bool) -> None:
        self.messages += 1
        await self._coordinator.epoch_ended(uid, epoch, error, is_fault)

    async def unregister(self, uid: str) -> None:
        self.messages += 1
        await self._coordinator.unregister(uid)


class _Rank(FakeRank):
    """A simulated rank whose calls are counted."""

    def __init__(self, counted: _Counted, coordinator: Coordinator, uid: str, role: Role, ep_rank: int | None) -> None:
        super().__init__(coordinator, uid, role, ep_rank)
        self.agent = RankAgent(
            counted, Registration(uid, role, ep_rank), self, self if role is Role.ATTENTION else None, lambda _: None
        )


class _Cell:
    """A coordinator with as many ranks as it needs, half of them attention ranks."""

    def __init__(self, num_ranks: int) -> None:
        self.topology = Topology(num_ranks // 2, num_ranks - num_ranks // 2)
        placement = contiguous_placement(_EXPERTS, self.topology.num_expert)
        self.coordinator = Coordinator(self.topology, placement, "shm", 60.0, 60.0, time.monotonic)
        self.counted = _Counted(self.coordinator)
        self.ranks: list[_Rank] = []
        self._num_made = 0

    def add(self, role: Role, ep_rank: int | None) -> _Rank:
        """One more rank, registering."""
        self._num_made += 1
        rank = _Rank(self.counted, self.coordinator, f"{role.value}-{self._num_made}", role, ep_rank)
        rank.start()
        return rank

    async def start(self) -> None:
        """All ranks, in the first epoch."""
        topology = self.topology
        self.ranks = [self.add(Role.ATTENTION, None) for _ in range(topology.num_attention)]
        self.ranks += [self.add(Role.EXPERT, ep_rank) for ep_rank in range(topology.num_expert)]
        await next_running(self.coordinator, self.ranks[0], 0)

    async def stop(self) -> None:
        """Ends every rank."""
        for rank in self.ranks:
            await rank.die()


_Act = Callable[[_Cell], Awaitable[None]]


def coordinator_curves(rounds: int, sizes: Sequence[int]) -> list[Curve]:
    """Cells of `sizes` simulated ranks."""
    ranks = "ranks"
    told = "every rank is told to leave and to join, and reports both"
    return [
        Curve(
            "epoch change, messages",
            ranks,
            "calls of all ranks",
            told,
            1,
            in_turn(sizes, 1, partial(_messages, _change)),
        ),
        Curve("epoch change, time", ranks, "CPU ms", told, 1, in_turn(sizes, rounds, partial(_cpu_ms, _change))),
        Curve(
            "lost rank replaced, time",
            ranks,
            "CPU ms until the next epoch runs",
            told,
            1,
            in_turn(sizes, rounds, partial(_cpu_ms, _replace_one)),
        ),
        Curve(
            "all shards replaced at once",
            ranks,
            "CPU ms until the next epoch runs",
            "each is told and reports as in any epoch change",
            1,
            in_turn(sizes, rounds, partial(_cpu_ms, _replace_shards)),
        ),
        Curve(
            "heartbeats of all ranks",
            ranks,
            "CPU us a round",
            "each rank asks once",
            1,
            in_turn(sizes, rounds, lambda size: _cpu_ms(_heartbeat, size) * 1e3),
        ),
        Curve(
            "status",
            ranks,
            "CPU us",
            "a line for each rank",
            1,
            in_turn(sizes, rounds, lambda size: _cpu_ms(_status, size) * 1e3 / _STATUSES),
        ),
    ]


_STATUSES = 20


def _messages(act: _Act, num_ranks: int) -> float:
    async def count(cell: _Cell) -> float:
        before = cell.counted.messages
        await act(cell)
        return cell.counted.messages - before

    return asyncio.run(_in_cell(num_ranks, count))


def _cpu_ms(act: _Act, num_ranks: int) -> float:
    async def least(cell: _Cell) -> float:
        taken = []
        for _ in range(_CHANGES):
            begun = time.process_time()
            await act(cell)
            taken.append(time.process_time() - begun)
        return min(taken) * 1e3

    return asyncio.run(_in_cell(num_ranks, least))


async def _in_cell(num_ranks: int, measure: Callable[[_Cell], Awaitable[float]]) -> float:
    cell = _Cell(num_ranks)
    async with running(cell.coordinator):
        await cell.start()
        result = await measure(cell)
        await cell.stop()
    return result


async def _change(cell: _Cell) -> None:
    """The last rank leaves its epoch in order; all others are told to."""
    await _next_epoch(cell, lambda: cell.ranks[-1].end(None))


async def _replace_one(cell: _Cell) -> None:
    """The last shard's process is gone, and its successor registers."""
    await _replace(cell, [len(cell.ranks) - 1])


async def _replace_shards(cell: _Cell) -> None:
    """All shards' processes are gone."""
    await _replace(cell, range(cell.topology.num_attention, len(cell.ranks)))


async def _replace(cell: _Cell, places: Sequence[int]) -> None:
    for place in places:
        await cell.ranks[place].die()

    def register_successors() -> None:
        for place in places:
            cell.ranks[place] = cell.add(Role.EXPERT, place - cell.topology.num_attention)

    await _next_epoch(cell, register_successors)


async def _next_epoch(cell: _Cell, begin: Callable[[], None]) -> None:
    before = cell.ranks[0].epochs[-1]
    begin()
    await next_running(cell.coordinator, cell.ranks[0], before)


async def _heartbeat(cell: _Cell) -> None:
    """Every rank asks for a command while none is there."""
    await asyncio.gather(*(cell.coordinator.next_command(rank.agent._uid, 0.0) for rank in cell.ranks))


async def _status(cell: _Cell) -> None:
    for _ in range(_STATUSES):
        cell.coordinator.status()
