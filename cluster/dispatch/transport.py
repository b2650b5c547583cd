"""How bytes travel: one all-to-all over all ranks of the epoch, named in every error it raises."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist

from cluster.dispatch.order import Exchange
from cluster.rendezvous import first_line
from cluster.shm.mesh import Mesh
from cluster.waiting import WaitTally
from model_shards.errors import EpochAbortedError

_FAILURES = (RuntimeError, OSError, ValueError)  # of transports


@dataclass(frozen=True)
class Lane:
    """The bytes of one direction of one micro-batch, as one rank sees them, in steps of one plan."""

    send: torch.Tensor  # uint8, the segments for each rank in rank order
    recv: torch.Tensor  # uint8, the segments from each rank in rank order
    send_splits: list[int]  # bytes for each rank; world_size long
    recv_splits: list[int]  # bytes from each rank


class Carrier(Protocol):
    """Carries one lane, in every layer of a step. Between `start` and `end` the lane must not be touched."""

    def start(self) -> None:
        """Begins an all-to-all; does not wait."""
        ...

    def end(self) -> None:
        """Ends the one that was begun last."""
        ...


class Transport(Protocol):
    """Of one epoch. `waited` is what its carriers have waited, by the host's clock."""

    @property
    def waited(self) -> WaitTally: ...

    def carrier(self, lane: Lane) -> Carrier: ...


class DirectTransport:
    """The group reads and writes the lane's own memory: gloo for CPU tensors, nccl for CUDA tensors.

    With nccl, ending an exchange makes the current stream wait, not the host.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.waited = WaitTally()

    def carrier(self, lane: Lane) -> Carrier:
        return _GroupCarrier(self._group, lane, lane.send, lane.recv, self.waited)


class StagedTransport:
    """CUDA tensors over gloo, by way of host memory: for several ranks on one GPU, which nccl does not allow.

    The host waits for the GPU in every exchange, so this is no transport to measure.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.waited = WaitTally()

    def carrier(self, lane: Lane) -> Carrier:
        return _StagedCarrier(self._group, lane, self.waited)


class SharedTransport:
    """CPU tensors between ranks of one host. What leaves is copied at the start, what arrives at the end.

    Peers that get or send no bytes are not waited for: an exchange here is no barrier.
    """

    def __init__(self, mesh: Mesh, timeout_s: float) -> None:
        self._mesh = mesh
        self._timeout_s = timeout_s
        self.waited = mesh.waited

    def carrier(self, lane: Lane) -> Carrier:
        return SharedCarrier(self._mesh, lane, self._timeout_s)


class _GroupCarrier:
    def __init__(
        self, group: dist.ProcessGroup, lane: Lane, send: torch.Tensor, recv: torch.Tensor, waited: WaitTally
    ) -> None:
        self._group = group
        self._lane = lane
        self._waited = waited
        self._send, self._recv = send, recv
        self._work: dist.Work | None = None

    def start(self) -> None:
        lane = self._lane
        self._work = self._group.alltoall_base(self._recv, self._send, lane.recv_splits, lane.send_splits)

    def end(self) -> None:
        assert self._work is not None, "an exchange is under way"
        begun = time.monotonic_ns()
        self._work.wait()
        self._waited.add(time.monotonic_ns() - begun)
        self._work = None


class _StagedCarrier:
    def __init__(self, group: dist.ProcessGroup, lane: Lane, waited: WaitTally) -> None:
        self._lane = lane
        self._send = torch.empty(lane.send.shape, dtype=torch.uint8)
        self._recv = torch.empty(lane.recv.shape, dtype=torch.uint8)
        self._carrier = _GroupCarrier(group, lane, self._send, self._recv, waited)

    def start(self) -> None:
        self._send.copy_(self._lane.send)
        self._carrier.start()

    def end(self) -> None:
        self._carrier.end()
        self._lane.recv.copy_(self._recv)


class SharedCarrier:
    """What it sends and receives may be calls of a program: `sender.call` in place of a start with something to send,
    `receiver.call` between `start` and `end`, which then waits only for what is missing."""

    def __init__(self, mesh: Mesh, lane: Lane, timeout_s: float) -> None:
        self.sender = mesh.sender(tuple(_segments(lane.send, lane.send_splits)))
        self.receiver = mesh.receiver(tuple(_segments(lane.recv, lane.recv_splits)))
        self._timeout_s = timeout_s

    def start(self) -> None:
        self.receiver.expect(time.monotonic() + self._timeout_s)
        self.sender.send()

    def end(self) -> None:
        self.receiver.receive()


def _segments(buffer: torch.Tensor, splits: list[int]) -> Iterator[tuple[int, torch.Tensor]]:
    """(rank, its bytes) for every rank that has any."""
    start = 0
    for rank, size in enumerate(splits):
        if size:
            yield rank, buffer[start : start + size]
        start += size


class Link:
    """A rank's end of the exchanges of one epoch. Every rank must start the same exchanges in the same order."""

    is_traced = False  # whether waits are to be seen here, all of them

    def __init__(self, transport: Transport, epoch: int, rank_name: str) -> None:
        self._transport = transport
        self._epoch = epoch
        self._rank_name = rank_name

    @property
    def waited_s(self) -> float:
        """Seconds that this rank has waited in exchanges of the epoch, by the host's clock."""
        return self._transport.waited.seconds

    def carrier(self, lane: Lane) -> Carrier:
        """What carries a lane. Raises EpochAbortedError when there is no memory for its messages."""
        try:
            return self._transport.carrier(lane)
        except _FAILURES as error:
            at = f"epoch {self._epoch} on rank {self._rank_name}"
            raise EpochAbortedError(f"no room for the messages of {at}: {first_line(error)}") from error

    def start(self, exchange: Exchange, carrier: Carrier) -> None:
        """Begins an exchange. Raises EpochAbortedError when that is not possible."""
        try:
            carrier.start()
        except _FAILURES as error:
            raise EpochAbortedError(f"{self._label(exchange)} could not start: {first_line(error)}") from error

    def end(self, exchange: Exchange, carrier: Carrier) -> None:
        """Waits for its end. Raises EpochAbortedError when a rank was lost or the deadline passed."""
        try:
            carrier.end()
        except _FAILURES as error:
            raise EpochAbortedError(f"{self._label(exchange)} failed: {first_line(error)}") from error

    def _label(self, exchange: Exchange) -> str:
        return (
            f"{exchange.direction.value} of layer {exchange.layer}, micro-batch {exchange.micro_batch}, "
            f"epoch {self._epoch} on rank {self._rank_name}"
        )


class BufferPool:
    """Byte buffers that stay from step to step. Each is as long as the next power of two of the most asked for."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[str, torch.Tensor] = {}

    def take(self, name: str, num_bytes: int) -> torch.Tensor:
        """The first `num_bytes` of buffer `name`: uint8. Whoever held it before loses it."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape[0] < num_bytes:
            bucket = 1 << max(num_bytes - 1, 0).bit_length()
            buffer = torch.zeros(bucket, dtype=torch.uint8, device=self._device)
            self._buffers[name] = buffer
        return buffer[:num_bytes]
