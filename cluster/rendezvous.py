"""Where the ranks of an epoch meet: a TCPStore that rank 0 serves, and the connections to it.

A blocked `wait` holds its connection, never the server: a rank that waits for a key on one connection and sets
keys on another must call `connect_rendezvous` twice.
"""

import os
import socket
from dataclasses import dataclass
from datetime import timedelta

from torch._C._distributed_c10d import TCPStore  # torch.distributed has it, but its stubs do not export it

from cluster.membership import Rendezvous
from model_shards.errors import EpochAbortedError

_BACKLOG = 1024  # as many ranks may connect at one instant
# TCPStore asks DNS for the name of each peer, only to log it, and its server does so in its one thread: with the
# resolver's own settings one lost answer stops every rank for 5 s. Read by the C library in each new thread.
_IMPATIENT_RESOLVER = {"RES_OPTIONS": "timeout:1 attempts:1"}


@dataclass(frozen=True)
class RendezvousServer:
    """A running store; it stops when the last reference to it goes."""

    rendezvous: Rendezvous
    store: TCPStore


def serve_rendezvous(host: str) -> RendezvousServer:
    """Serves a store on a free port of `host`, and on no other interface. Raises OSError when it cannot listen.

    TCPStore by itself listens on every interface, so it is handed a socket that is bound already.
    """
    _bound_name_lookups()
    family, kind, protocol, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.bind(address)
        listener.listen(_BACKLOG)
        port = int(listener.getsockname()[1])
        store = TCPStore(
            host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.fileno(), use_libuv=True
        )
    except BaseException:
        listener.close()
        raise
    listener.detach()  # the store owns the descriptor now
    return RendezvousServer(Rendezvous(host, port), store)


def connect_rendezvous(rendezvous: Rendezvous, timeout_s: float) -> TCPStore:
    """One connection to the epoch's store; `timeout_s` bounds the connect and is the default of its waits.

    Raises EpochAbortedError when the store does not answer in time.
    """
    _bound_name_lookups()
    try:
        return TCPStore(
            rendezvous.host,
            rendezvous.port,
            is_master=False,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
        )
    except (RuntimeError, OSError) as error:
        raise EpochAbortedError(
            f"rank A0's rendezvous at {rendezvous.host}:{rendezvous.port} did not answer within {timeout_s:g} s: "
            f"{first_line(error)}"
        ) from error


def _bound_name_lookups() -> None:
    for name, value in _IMPATIENT_RESOLVER.items():
        os.environ.setdefault(name, value)


def local_address_towards(rendezvous: Rendezvous) -> str:
    """This machine's address on the route to the rendezvous: the only one a rank listens on.

    For a rendezvous on 127.0.0.1 that is 127.0.0.1. Nothing is sent: connecting a datagram socket only picks a route.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(rendezvous.host, rendezvous.port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])


def first_line(error: BaseException) -> str:
    """What happened, without the C++ stack that torch appends."""
    return str(error).split("\n", 1)[0]
