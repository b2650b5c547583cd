"""Messages of one rank to its peers, or from them: of the same sizes, and in the same places, in every layer."""

import ctypes
import time
from collections.abc import Callable, Sequence

import torch

from cluster.shm.calls import INCOMING, OUTGOING, RECEIVE_ARGUMENTS, SEND_ARGUMENTS, receive_code, send_code
from cluster.shm.outbox import Inbox, Outbox, Way
from cluster.waiting import WaitTally
from model_shards.kernels.program import Call, Halt

# (rank, where the message goes, deadline, whether its semaphore was taken): waits for it, or raises.
Finish = Callable[[int, torch.Tensor, float, bool], None]


class Sender:
    """For one thread."""

    def __init__(self, outbox: Outbox, messages: Sequence[tuple[int, torch.Tensor]], waited: WaitTally) -> None:
        """uint8 [B] by reader, which the outbox has room for; in the order in which readers are woken."""
        self._outbox = outbox
        self._messages = messages  # kept: the call has their addresses only
        self._parts = _parts(OUTGOING, [("source", outbox.way(rank), message) for rank, message in messages])
        self._waited = waited
        # What `send` does, as one call of a program; sends nothing once the outbox is closed.
        self.call = Call(
            send_code(),
            SEND_ARGUMENTS,
            count=len(messages),
            messages=ctypes.addressof(self._parts),
            waited=waited.address,
        )

    def send(self) -> None:
        """Copies all of them, then wakes their readers. Raises RuntimeError when the outbox is closed."""
        if self._outbox.is_closed:
            raise RuntimeError("this rank has left the epoch")
        if self._messages:
            self.call.run(1)


class Receiver:
    """For one thread."""

    def __init__(self, messages: Sequence[tuple[int, Inbox, torch.Tensor]], finish: Finish, waited: WaitTally) -> None:
        """Peers' numbers and inboxes, and where their messages go: uint8 of their sizes."""
        self._messages = messages  # kept: the call has their addresses only
        self._finish = finish
        self._parts = _parts(INCOMING, [("target", inbox.way(), out) for _, inbox, out in messages])
        self._waited = waited
        self._deadline = 0.0
        self.halt = Halt()
        # What `receive` does while all goes well, as one call of a program, which halts otherwise.
        self.call = Call(
            receive_code(),
            RECEIVE_ARGUMENTS,
            count=len(messages),
            messages=ctypes.addressof(self._parts),
            first=0,
            seconds=0,
            nanoseconds=0,
            taken=0,
            waited=waited.address,
            halt=self.halt.address,
        )

    def expect(self, deadline: float) -> None:
        """The next message of each peer is to be received; `deadline` is on time.monotonic()'s clock."""
        self._deadline = deadline
        self.halt.clear()
        self.call.set(first=0, seconds=int(deadline), nanoseconds=int(deadline % 1 * 1e9), taken=0)

    def receive(self) -> None:
        """Waits for all that `call` has not received yet. Raises what `finish` raises."""
        while (first := self.call.get("first")) < len(self._messages):
            if self.halt.is_set:
                rank, _, out = self._messages[first]
                begun = time.monotonic_ns()
                self._finish(rank, out, self._deadline, bool(self.call.get("taken")))
                self._waited.add(time.monotonic_ns() - begun)
                self.halt.clear()
                self.call.set(first=first + 1)
            else:
                self.call.run(1)


def _parts(names: Sequence[str], messages: Sequence[tuple[str, Way, torch.Tensor]]) -> "ctypes.Array[ctypes.c_int64]":
    """What compiled code knows of messages, one after another; of each the part that says where it lies here, how it
    goes, and itself."""
    values: list[int] = []
    for place, way, message in messages:
        assert message.dtype is torch.uint8, "bytes"
        assert message.is_contiguous(), "bytes lie one after another"
        known = {place: message.data_ptr(), "size": message.shape[0]} | vars(way)
        values += [known[name] for name in names]
    return (ctypes.c_int64 * len(values))(*values)
