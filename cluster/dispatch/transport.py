"""How bytes travel: one all-to-all over all ranks of the epoch, named in every error it raises."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist

from cluster.dispatch.order import Exchange
from cluster.rendezvous import first_line
from cluster.shm.mesh import Mesh
from model_shards.errors import EpochAbortedError


@dataclass(frozen=True)
class Lane:
    """The bytes of one direction of one micro-batch, as one rank sees them; made once per step."""

    send: torch.Tensor  # uint8, the segments for each rank in rank order
    recv: torch.Tensor  # uint8, the segments from each rank in rank order
    send_splits: list[int]  # bytes for each rank; world_size long
    recv_splits: list[int]  # bytes from each rank


class Transport(Protocol):
    """Starts an all-to-all; the function returned ends it. `lane` must not be touched in between."""

    def start(self, lane: Lane) -> Callable[[], None]: ...


class DirectTransport:
    """The group reads and writes the lane's own memory: gloo for CPU tensors, nccl for CUDA tensors.

    With nccl, ending an exchange makes the current stream wait, not the host.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group

    def start(self, lane: Lane) -> Callable[[], None]:
        work = self._group.alltoall_base(lane.recv, lane.send, lane.recv_splits, lane.send_splits)

        def end() -> None:
            work.wait()

        return end


class StagedTransport:
    """CUDA tensors over gloo, by way of host memory: for several ranks on one GPU, which nccl does not allow.

    The host waits for the GPU in every exchange, so this is no transport to measure.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group

    def start(self, lane: Lane) -> Callable[[], None]:
        send = lane.send.cpu()
        recv = torch.empty(lane.recv.shape, dtype=torch.uint8)
        work = self._group.alltoall_base(recv, send, lane.recv_splits, lane.send_splits)

        def end() -> None:
            work.wait()
            lane.recv.copy_(recv)

        return end


class SharedTransport:
    """CPU tensors between ranks of one host. What leaves is copied at the start, what arrives at the end.

    Peers that get or send no bytes are not waited for: an exchange here is no barrier.
    """

    def __init__(self, mesh: Mesh, timeout_s: float) -> None:
        self._mesh = mesh
        self._timeout_s = timeout_s

    def start(self, lane: Lane) -> Callable[[], None]:
        deadline = time.monotonic() + self._timeout_s
        self._mesh.send(tuple(_segments(lane.send, lane.send_splits)))

        def end() -> None:
            for rank, out in _segments(lane.recv, lane.recv_splits):
                self._mesh.receive(rank, out, deadline)

        return end


def _segments(buffer: torch.Tensor, splits: list[int]) -> Iterator[tuple[int, torch.Tensor]]:
    """(rank, its bytes) for every rank that has any."""
    start = 0
    for rank, size in enumerate(splits):
        if size:
            yield rank, buffer[start : start + size]
        start += size


class Flight:
    """An exchange under way."""

    def __init__(self, label: str, end: Callable[[], None]) -> None:
        self.label = label
        self.end = end  # of the transport: raises what that raises

    def wait(self) -> None:
        """Ends the exchange; once. Raises EpochAbortedError when a rank was lost or the deadline passed."""
        try:
            self.end()
        except (RuntimeError, OSError, ValueError) as error:
            raise EpochAbortedError(f"{self.label} failed: {first_line(error)}") from error


class Link:
    """A rank's end of the exchanges of one epoch."""

    def __init__(self, transport: Transport, epoch: int, rank_name: str) -> None:
        self._transport = transport
        self._epoch = epoch
        self._rank_name = rank_name

    def post(self, exchange: Exchange, lane: Lane) -> Flight:
        """Starts an exchange; every rank must post the same exchanges in the same order."""
        label = (
            f"{exchange.direction.value} of layer {exchange.layer}, micro-batch {exchange.micro_batch}, "
            f"epoch {self._epoch} on rank {self._rank_name}"
        )
        try:
            return Flight(label, self._transport.start(lane))
        except (RuntimeError, OSError, ValueError) as error:
            raise EpochAbortedError(f"{label} could not start: {first_line(error)}") from error


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
