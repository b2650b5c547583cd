"""The meshes of all ranks of an epoch in one process, each for a thread of a test."""

import contextlib
from collections.abc import Iterator

from cluster.shm.mesh import Mesh, address_of
from cluster.shm.outbox import Outbox


@contextlib.contextmanager
def meshes(count: int) -> Iterator[list[Mesh]]:
    """By rank; the ranks are named R0, R1, ..."""
    outboxes = [Outbox(count) for _ in range(count)]
    addresses = [address_of(outbox) for outbox in outboxes]
    names = [f"R{rank}" for rank in range(count)]
    with contextlib.ExitStack() as stack:
        made = [Mesh(outbox, addresses, rank, names) for rank, outbox in enumerate(outboxes)]
        for mesh in made:
            stack.callback(mesh.close)
        yield made
