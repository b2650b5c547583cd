"""The memory in which one rank writes its messages to all others.

A rank makes one anonymous file (memfd) per epoch and writes only to its own; peers open it through /proc/PID/fd. It
goes with its processes: a kill -9 leaves nothing behind.

    head       token of 16 bytes, padded to 64
    box 0      what rank 0 is to read           [ semaphore rows | semaphore data | closed | rows | descriptors ]
    box 1      ...
    ---------- page boundary
    data       regions of messages, in the order in which they were first needed; the file grows, nothing moves

Each box has two queues. A message is written first, its sequence number last. The semaphore is posted then, or, of
messages to several readers, when all of them are written:

    rows         int64 [RING, ROW]     number, ROW - 1 values        step headers
    descriptors  int64 [RING, 4]       number, offset, size          bytes in the data region

Slot `number % RING` is written again without asking whether it was read. Lockstep makes that safe: a rank sends at most
one message per micro-batch before it needs an answer that its reader gives only after reading (docs/dispatch.md).
"""

import ctypes
import mmap
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from cluster.shm.calls import DESCRIPTOR, RING
from cluster.shm.semaphore import SIZE, Semaphore

ROW = 10  # int64 of a row, its number included; a box is whole lines of 64 bytes
TOKEN_BYTES = 16
_HEAD = 64
_CLOSED = 2 * SIZE
_ROWS = 128
_DESCRIPTORS = _ROWS + RING * ROW * 8
_BOX = _DESCRIPTORS + RING * DESCRIPTOR * 8
_SMALLEST_REGION = 1 << 12


class _Box:
    """One reader's part of the head."""

    def __init__(self, memory: mmap.mmap, rank: int, *, create: bool) -> None:
        start = _HEAD + rank * _BOX
        self.rows_posted = Semaphore(memory, start, create=create)
        self.data_posted = Semaphore(memory, start + SIZE, create=create)
        self.closed = _int64(memory, start + _CLOSED, 1)
        self.rows = _int64(memory, start + _ROWS, RING * ROW).reshape(RING, ROW)
        self.descriptors = _int64(memory, start + _DESCRIPTORS, RING * DESCRIPTOR).reshape(RING, DESCRIPTOR)


@dataclass(frozen=True)
class Way:
    """Addresses of what a message to, or from, one peer takes (`cluster.shm.calls`); as long as the box they are of."""

    number: int
    ring: int
    regions: int  # 0 where messages come from
    data: int
    semaphore: int


class Outbox:
    """The writing end; one thread writes."""

    def __init__(self, world_size: int) -> None:
        self.token = secrets.token_bytes(TOKEN_BYTES)
        self._head_bytes = _head_bytes(world_size)
        self._file = os.memfd_create("shoal-outbox", os.MFD_CLOEXEC)
        try:
            os.ftruncate(self._file, self._head_bytes)
            head = mmap.mmap(self._file, self._head_bytes)
            self._boxes = [_Box(head, rank, create=True) for rank in range(world_size)]
        except BaseException:
            os.close(self._file)
            raise
        self._rows_sent = [0] * world_size
        self._sent = np.zeros(world_size, np.int64)
        self._regions = np.zeros((world_size, RING), np.int64)  # offsets of the room that a slot's messages have
        self._room = [0] * world_size  # bytes of each
        self._mapping = _Mapping()
        self._data_bytes = 0
        self.is_closed = False
        head[:TOKEN_BYTES] = self.token

    @property
    def file(self) -> int:
        """The descriptor that peers open."""
        return self._file

    @property
    def messages_sent(self) -> int:
        """To all readers so far."""
        return int(self._sent.sum())

    def send_row(self, reader: int, values: list[int]) -> None:
        """Posts up to ROW - 1 integers."""
        box, number = self._boxes[reader], self._rows_sent[reader] + 1
        row = box.rows[number % RING]
        row[1 : 1 + len(values)] = values
        row[0] = number
        self._rows_sent[reader] = number
        box.rows_posted.post()

    def reserve(self, reader: int, size: int) -> None:
        """Room for messages of up to `size` bytes; what was sent and not read stays where it is. Raises OSError when
        memory for it cannot be had, and RuntimeError when this is closed."""
        if self.is_closed:
            raise RuntimeError("this rank has left the epoch")
        if size <= self._room[reader]:
            return
        room = max(_SMALLEST_REGION, 1 << (size - 1).bit_length())
        begin = self._data_bytes
        # Not merely a longer file: memory that is not there must be an error here and not a signal at the first write.
        os.posix_fallocate(self._file, self._head_bytes + begin, RING * room)
        self._mapping.map(self._file, self._head_bytes, begin + RING * room)
        self._regions[reader] = [begin + slot * room for slot in range(RING)]
        self._room[reader] = room
        self._data_bytes = begin + RING * room

    def way(self, reader: int) -> Way:
        """Of messages to a reader, for `cluster.shm.calls.send_code`."""
        box = self._boxes[reader]
        return Way(
            number=_address(self._sent) + 8 * reader,
            ring=_address(box.descriptors),
            regions=_address(self._regions) + 8 * RING * reader,
            data=self._mapping.address,
            semaphore=box.data_posted.address,
        )

    def close(self) -> None:
        """Tells every reader that nothing more comes; what was sent can still be read. Idempotent."""
        if self.is_closed:
            return
        self.is_closed = True
        for box in self._boxes:
            box.closed[0] = 1
            box.rows_posted.post()
            box.data_posted.post()
        # The mappings go with the last that looks into them.
        self._boxes.clear()
        self._mapping.clear()
        os.close(self._file)


class Inbox:
    """One reader's end of a peer's outbox; one thread reads.

    Raises OSError when the peer is gone, and ValueError when what lies there is not the peer's outbox.
    """

    def __init__(self, process: int, file: int, token: bytes, world_size: int, reader: int) -> None:
        self._head_bytes = _head_bytes(world_size)
        # For writing, too: to take from a semaphore is to write.
        self._file = os.open(Path(f"/proc/{process}/fd/{file}"), os.O_RDWR | os.O_CLOEXEC)
        try:
            if os.fstat(self._file).st_size < self._head_bytes:
                raise ValueError(f"file {file} of process {process} is no outbox")
            head = mmap.mmap(self._file, self._head_bytes)
            if head[:TOKEN_BYTES] != token:
                raise ValueError(f"file {file} of process {process} is another outbox than expected")
        except BaseException:
            os.close(self._file)
            raise
        self._box = _Box(head, reader, create=False)
        self._rows_read = 0
        self._read = np.zeros(1, np.int64)  # messages
        self._mapping = _Mapping()

    @property
    def closed(self) -> bool:
        """Whether the peer closed its outbox."""
        return bool(self._box.closed[0])

    def wake(self) -> None:
        """Ends a wait of the reading thread, for any thread to call."""
        self._box.rows_posted.post()
        self._box.data_posted.post()

    def wait_row(self, deadline: float) -> bool:
        """Waits for a post: a row, or a wake; False when the deadline passed."""
        return self._box.rows_posted.wait(deadline)

    def wait_data(self, deadline: float) -> bool:
        """Waits for a post: a message, or a wake; False when the deadline passed."""
        return self._box.data_posted.wait(deadline)

    def take_row(self) -> list[int] | None:
        """The next row without its number, ROW - 1 values; None when there is none."""
        number = self._rows_read + 1
        row: list[int] = self._box.rows[number % RING].tolist()
        if row[0] != number:
            return None
        self._rows_read = number
        return row[1:]

    def way(self) -> Way:
        """Of messages from this peer, for `cluster.shm.calls.receive_code`."""
        return Way(
            number=_address(self._read),
            ring=_address(self._box.descriptors),
            regions=0,
            data=self._mapping.address,
            semaphore=self._box.data_posted.address,
        )

    def take(self, out: torch.Tensor) -> bool:
        """Copies the next message into uint8 `out`; False when there is none. Raises ValueError on another size."""
        number = int(self._read[0]) + 1
        written, offset, size, _ = self._box.descriptors[number % RING].tolist()
        if written != number:
            return False
        if size != out.shape[0]:
            raise ValueError(f"a message of {size} bytes came where {out.shape[0]} were due")
        if self._mapping.size < offset + size:
            self._mapping.map(self._file, self._head_bytes, os.fstat(self._file).st_size - self._head_bytes)
        if self._mapping.size < offset + size:
            raise ValueError(f"a message of {size} bytes at {offset} is beyond the peer's {self._mapping.size}")
        self._mapping.read(offset, out)
        self._read[0] = number
        return True

    def close(self) -> None:
        """Lets go of the peer's memory."""
        self._mapping.clear()
        os.close(self._file)


class _Mapping:
    """The data of an outbox as this process sees it: its address and size, where compiled code finds them."""

    def __init__(self) -> None:
        self._cell = np.zeros(2, np.int64)
        self._bytes: npt.NDArray[np.uint8] | None = None

    @property
    def address(self) -> int:
        """Of the address and the size."""
        return _address(self._cell)

    @property
    def size(self) -> int:
        """Bytes."""
        return int(self._cell[1])

    def map(self, file: int, offset: int, size: int) -> None:
        """In place of what was mapped before. Raises OSError."""
        mapped = np.frombuffer(mmap.mmap(file, size, offset=offset), np.uint8)
        self._cell[:] = (_address(mapped), size)
        self._bytes = mapped

    def read(self, offset: int, out: torch.Tensor) -> None:
        """Copies what lies there into all of uint8 `out`, on this thread: a team may have to wait for its cores."""
        ctypes.memmove(out.data_ptr(), int(self._cell[0]) + offset, out.shape[0])

    def clear(self) -> None:
        """Of no bytes."""
        self._cell[:] = 0
        self._bytes = None


def _address(array: npt.NDArray[np.int64] | npt.NDArray[np.uint8]) -> int:
    return int(array.__array_interface__["data"][0])


def _head_bytes(world_size: int) -> int:
    size = _HEAD + world_size * _BOX
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE


def _int64(memory: mmap.mmap, offset: int, count: int) -> npt.NDArray[np.int64]:
    return np.frombuffer(memory, np.int64, count, offset)
