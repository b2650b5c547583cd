"""Every rank's end of the messages of one epoch.

before the ranks meet    outbox = Outbox(world_size); each tells the others an Address
when all have met        mesh = Mesh(outbox, addresses, ...)
before a step            mesh.sender(...), mesh.receiver(...) for the messages of a layer, which are run in each
"""

import functools
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from cluster.shm.messages import Receiver, Sender
from cluster.shm.outbox import Inbox, Outbox
from cluster.shm.semaphore import available
from cluster.shm.watch import ProcessWatch
from cluster.waiting import WaitTally


class PeerLostError(RuntimeError):
    """A peer died, left the epoch, or did not send in time; the message names it."""


@dataclass(frozen=True)
class Address:
    """Where a rank's outbox is, and on which host."""

    host: str  # equal for processes that can open each other's files
    process: int
    file: int
    token: str  # hexadecimal

    def encode(self) -> str:
        """For a store of strings."""
        return json.dumps(asdict(self))

    @staticmethod
    def decode(text: str) -> "Address":
        """The inverse of `encode`."""
        return Address(**json.loads(text))


@functools.cache
def supported() -> bool:
    """Whether this process has what shared memory takes: Linux with memfd and pidfd, glibc 2.30, its own /proc.

    Tried, not asked for by version: a sandbox may forbid any of these.
    """
    if sys.platform != "linux" or not hasattr(os, "pidfd_open") or not available():
        return False
    try:
        os.close(os.pidfd_open(os.getpid()))
        outbox = Outbox(1)
        try:
            address = address_of(outbox)
            Inbox(address.process, address.file, outbox.token, 1, 0).close()
        finally:
            outbox.close()
    except OSError:
        return False
    return True


def host_identity() -> str:
    """Kernel, process-number space and user: where they are equal, processes open each other's files."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot}/{Path('/proc/self/ns/pid').readlink()}/{os.getuid()}"


def address_of(outbox: Outbox) -> Address:
    """The address of this process's outbox."""
    return Address(host_identity(), os.getpid(), outbox.file, outbox.token.hex())


class Mesh:
    """Sends and receives for one rank; used by one thread. Takes over the outbox.

    Raises OSError or ValueError when constructed if a peer is gone.
    """

    def __init__(self, outbox: Outbox, addresses: Sequence[Address], me: int, names: Sequence[str]) -> None:
        """`addresses` and `names` by global rank."""
        self._outbox = outbox
        self._me = me
        self._names = names
        self._gone: str | None = None  # a peer whose process is gone
        self._inboxes: dict[int, Inbox] = {}
        self._closed = False
        self.waited = WaitTally()  # in what `sender` and `receiver` give, not in `gather`
        others = [rank for rank in range(len(addresses)) if rank != me]
        try:
            for rank in others:
                at = addresses[rank]
                token = bytes.fromhex(at.token)
                self._inboxes[rank] = Inbox(at.process, at.file, token, len(addresses), me)
            processes = {rank: addresses[rank].process for rank in others if addresses[rank].process != os.getpid()}
            self._watch = ProcessWatch(processes, self._exited)
        except BaseException:
            for inbox in self._inboxes.values():
                inbox.close()
            raise

    @property
    def messages_sent(self) -> int:
        """To all peers so far."""
        return self._outbox.messages_sent

    def sender(self, messages: Sequence[tuple[int, torch.Tensor]]) -> Sender:
        """Of messages to peers, by rank: uint8 tensors that are read each time. Raises OSError without memory.

        So that the peer on this rank's core is woken last, each rank ends with the peer of its own number: ranks of
        both roles are dealt to the cores in order (`cluster.device`), and when one of the roles has one rank, or both
        have as many, that is the one on its core. Until then the others must not wait for their message.
        """
        for rank, message in messages:
            self._outbox.reserve(rank, message.shape[0])
        order = [(index + self._me + 1) % len(messages) for index in range(len(messages))]
        return Sender(self._outbox, [messages[index] for index in order], self.waited)

    def receiver(self, messages: Sequence[tuple[int, torch.Tensor]]) -> Receiver:
        """Of messages from peers, by rank, into uint8 tensors of their sizes. Receiving raises PeerLostError.

        Raises RuntimeError when this rank has left.
        """
        if self._closed:
            raise RuntimeError("this rank has left the epoch")
        return Receiver([(rank, self._inboxes[rank], out) for rank, out in messages], self._finish, self.waited)

    def gather(self, row: list[int], deadline: float) -> list[list[int]]:
        """Sends integers, less than `outbox.ROW`, to all ranks and waits for theirs; by global rank. Raises
        PeerLostError."""
        for rank in self._inboxes:
            self._outbox.send_row(rank, row)
        ranks = range(len(self._names))
        return [row if rank == self._me else self._receive_row(rank, len(row), deadline) for rank in ranks]

    def close(self) -> None:
        """Leaves: peers that wait for this rank, now or later, get a PeerLostError. Idempotent; on the thread that
        sends."""
        if self._closed:
            return
        self._closed = True
        self._watch.close()
        self._outbox.close()
        for inbox in self._inboxes.values():
            inbox.close()
        self._inboxes.clear()

    def _finish(self, rank: int, out: torch.Tensor, deadline: float, posted: bool) -> None:
        """Waits for the next message of a peer, whose semaphore was taken or not, with an answer for everything that
        can be in the way."""
        inbox = self._inboxes[rank]
        while True:
            posted = posted or inbox.wait_data(deadline)
            # Asked before looking: what was sent before the end is there by now.
            ended = self._ended(rank, inbox)
            if inbox.take(out):
                return
            self._raise_if_over(rank, ended, posted)
            posted = False

    def _receive_row(self, rank: int, length: int, deadline: float) -> list[int]:
        inbox = self._inboxes[rank]
        while True:
            posted = inbox.wait_row(deadline)
            ended = self._ended(rank, inbox)
            row = inbox.take_row()
            if row is not None:
                return row[:length]
            self._raise_if_over(rank, ended, posted)

    def _ended(self, rank: int, inbox: Inbox) -> str | None:
        """Why nothing more can come. A process that is gone ends every wait: the step cannot succeed without it."""
        if self._gone is not None:
            return f"the process of rank {self._gone} is gone"
        return f"rank {self._names[rank]} left the epoch" if inbox.closed else None

    def _raise_if_over(self, rank: int, ended: str | None, posted: bool) -> None:
        """Nothing was there: because of an end, a deadline, or a wake for another reason, after which one waits on."""
        if ended is not None:
            raise PeerLostError(ended)
        if not posted:
            raise PeerLostError(f"rank {self._names[rank]} sent nothing in time")

    def _exited(self, rank: int) -> None:
        """From the watching thread. A peer that closed before it went left in order, and nobody misses it."""
        if not self._inboxes[rank].closed:
            self._gone = self._names[rank]
        for inbox in self._inboxes.values():
            inbox.wake()
