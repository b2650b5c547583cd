"""What ranks cost each other: joining an epoch, headers, exchanges. Up to 64 light processes on this machine.

They share its few cores, so what a rank costs is its CPU time; wall time is that of all ranks over the cores.
"""

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from benchmarks.scaling.curve import Curve
from benchmarks.scaling.law import Point
from benchmarks.scaling.pool import RankPool
from benchmarks.scaling.rank_work import Load, RankCost, rank_work
from cluster.membership import Membership
from cluster.rendezvous import serve_rendezvous
from cluster.topology import Topology
from model_shards.placement import contiguous_placement

_NUM_EXPERTS = 64
_TIMEOUT_S = 60.0
_ROWS = 32
_STEPS = 12
_EPOCHS = itertools.count(1)


@dataclass(frozen=True)
class _Epoch:
    """One epoch of some topology, on all ranks."""

    topology: Topology
    ranks: tuple[RankCost, ...]
    store_cpu_s: float  # of the process that serves the store, while the ranks joined and exchanged

    def mean(self, cost: Callable[[RankCost], float]) -> float:
        """Over all ranks."""
        return sum(map(cost, self.ranks)) / len(self.ranks)

    def attention(self, cost: Callable[[RankCost], float]) -> float:
        """Mean over the attention ranks."""
        chosen = self.ranks[: self.topology.num_attention]
        return sum(map(cost, chosen)) / len(chosen)

    def expert(self, cost: Callable[[RankCost], float]) -> float:
        """Mean over the expert ranks."""
        chosen = self.ranks[self.topology.num_attention :]
        return sum(map(cost, chosen)) / len(chosen)


def rank_curves(rounds: int, sizes: Sequence[int], partners: Sequence[int]) -> list[Curve]:
    """Cells of `sizes` ranks that join and send headers; 1 attention rank with `partners` shards, and the reverse."""
    with RankPool[RankCost](max(*sizes, *(count + 1 for count in partners))) as pool:
        join = {size: Topology(1, size - 1) for size in sizes}
        joined = _measure(pool, join, rounds, Load(headers=30, steps=0, rows=0))
        by_n = _measure(pool, {n: Topology(1, n) for n in partners}, rounds, Load(10, _STEPS, _ROWS))
        by_m = _measure(pool, {m: Topology(m, 1) for m in partners}, rounds, Load(10, _STEPS, _ROWS))
    return [*_join_curves(joined), *_exchange_curves(by_n, by_m)]


_Epochs = dict[int, list[_Epoch]]


def _measure(pool: RankPool[RankCost], topologies: dict[int, Topology], rounds: int, load: Load) -> _Epochs:
    measured: _Epochs = {x: [] for x in topologies}
    for number in range(rounds + 1):
        for x, topology in topologies.items():
            epoch = _run(pool, topology, load)
            if number:  # the first round touches code and memory that the later ones find there
                measured[x].append(epoch)
    return measured


def _run(pool: RankPool[RankCost], topology: Topology, load: Load) -> _Epoch:
    server = serve_rendezvous("127.0.0.1")
    placement = contiguous_placement(_NUM_EXPERTS, topology.num_expert)
    membership = Membership(next(_EPOCHS), topology, placement, server.rendezvous, "shm", _TIMEOUT_S, _TIMEOUT_S)
    cpu = time.process_time()
    ranks = pool.run([partial(rank_work, membership, rank, load) for rank in range(topology.world_size)], _TIMEOUT_S)
    return _Epoch(topology, tuple(ranks), time.process_time() - cpu)


def _points(epochs: _Epochs, cost: Callable[[_Epoch], float]) -> tuple[Point, ...]:
    return tuple(Point(x, tuple(map(cost, measured))) for x, measured in epochs.items())


def _join_curves(epochs: _Epochs) -> list[Curve]:
    return [
        Curve(
            "join, a rank",
            "ranks",
            "CPU ms of a rank",
            "it opens the memory of every other rank",
            1,
            _points(epochs, lambda epoch: epoch.mean(lambda rank: rank.join_cpu_s) * 1e3),
        ),
        Curve(
            "join, by the clock, over ranks",
            "ranks",
            "wall ms over ranks, until the slowest has joined",
            "the cores of this machine do the work of all ranks, which is linear for each",
            1,
            _points(epochs, lambda e: max(r.join_wall_s for r in e.ranks) / len(e.ranks) * 1e3),
        ),
        Curve(
            "join, the store, a rank",
            "ranks",
            "CPU ms of the store's process over ranks",
            "it tells each rank a word of every other",
            1,
            _points(epochs, lambda epoch: epoch.store_cpu_s / len(epoch.ranks) * 1e3),
        ),
        Curve(
            "leaving, by the clock, over ranks",
            "ranks",
            "wall ms over ranks, of the slowest",
            "each lets go of the memory of every other; the cores of this machine do that of all",
            1,
            _points(epochs, lambda epoch: max(rank.leave_wall_s for rank in epoch.ranks) / len(epoch.ranks) * 1e3),
        ),
        Curve(
            "memory, a rank",
            "ranks",
            "private MiB of a rank's process, torch's own included",
            "a connection and a box for every other rank",
            1,
            _points(epochs, lambda epoch: epoch.mean(lambda rank: rank.private_bytes) / 2**20),
        ),
        Curve(
            "descriptors of an epoch, a rank",
            "ranks",
            "open files, sockets and process handles",
            "a few for every other rank",
            1,
            _points(epochs, lambda epoch: epoch.mean(lambda rank: rank.descriptors)),
        ),
        Curve(
            "step header, a rank",
            "ranks",
            "CPU us of a rank",
            "each rank tells every other: linear for each",
            1,
            _points(epochs, lambda epoch: epoch.mean(lambda rank: rank.header_cpu_s) * 1e6),
        ),
        Curve(
            "step header, by the clock, over ranks",
            "ranks",
            "wall us over ranks",
            "the cores of this machine do the work of all ranks, which is linear for each",
            1,
            _points(epochs, lambda e: e.mean(lambda rank: rank.header_wall_s) / len(e.ranks) * 1e6),
        ),
    ]


def _exchange_curves(by_n: _Epochs, by_m: _Epochs) -> list[Curve]:
    return [
        Curve(
            "messages of a layer, A0",
            "expert ranks N",
            "messages",
            "one to each shard",
            1,
            _points(by_n, lambda epoch: epoch.attention(lambda rank: rank.messages)),
        ),
        Curve(
            "messages of a layer, E0",
            "attention ranks M",
            "messages",
            "one answer to each attention rank",
            1,
            _points(by_m, lambda epoch: epoch.expert(lambda rank: rank.messages)),
        ),
        Curve(
            "messages of a layer, all ranks",
            "expert ranks N, M = 1",
            "messages",
            "M x N there and M x N back",
            1,
            _points(by_n, lambda epoch: sum(rank.messages for rank in epoch.ranks)),
        ),
        Curve(
            "exchange of a layer, A0",
            "expert ranks N",
            "CPU us, 32 rows",
            "a segment has room for all rows of the rank, and there is one for each shard",
            1,
            _points(by_n, lambda epoch: epoch.attention(lambda rank: rank.layer_cpu_s) * 1e6),
        ),
        Curve(
            "exchange of a layer, E0",
            "attention ranks M",
            "CPU us, 32 rows from each",
            "one segment from each attention rank",
            1,
            _points(by_m, lambda epoch: epoch.expert(lambda rank: rank.layer_cpu_s) * 1e6),
        ),
    ]
