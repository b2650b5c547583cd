"""A membership: who takes part in one epoch. Immutable; a change is the next epoch."""

from dataclasses import dataclass

from cluster.topology import Topology
from model_shards.placement import ExpertPlacement


@dataclass(frozen=True)
class Rendezvous:
    """Where the ranks of one epoch meet: a TCPStore that rank 0 serves for this epoch only."""

    host: str
    port: int


@dataclass(frozen=True)
class Membership:
    """Everything a rank needs to join an epoch."""

    epoch: int
    topology: Topology
    placement: ExpertPlacement
    rendezvous: Rendezvous
    backend: str  # what carries the data: "nccl", "gloo", "shm", or "auto" (shm on one host, else gloo)
    join_timeout_s: float  # the ranks must all have joined by then
    exchange_timeout_s: float  # one exchange of a running step
