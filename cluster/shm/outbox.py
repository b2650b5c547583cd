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
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from cluster.shm.semaphore import SIZE, Semaphore

RING = 4  # messages a queue holds; more than the micro-batches of a step
ROW = 8  # int64 of a row, its number included
TOKEN_BYTES = 16
_HEAD = 64
_CLOSED = 2 * SIZE
_ROWS = 128
_DESCRIPTORS = _ROWS + RING * ROW * 8
_BOX = _DESCRIPTORS + RING * 4 * 8
_SMALLEST_REGION = 1 << 12


class _Box:
    """One reader's part of the head."""

    def __init__(self, memory: mmap.mmap, rank: int, *, create: bool) -> None:
        start = _HEAD + rank * _BOX
        self.rows_posted = Semaphore(memory, start, create=create)
        self.data_posted = Semaphore(memory, start + SIZE, create=create)
        self.closed = _int64(memory, start + _CLOSED, 1)
        self.rows = _int64(memory, start + _ROWS, RING * ROW).reshape(RING, ROW)
        self.descriptors = _int64(memory, start + _DESCRIPTORS, RING * 4).reshape(RING, 4)


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
        self._data_sent = [0] * world_size
        self._regions: dict[tuple[int, int], tuple[int, int]] = {}  # (reader, slot) -> offset, bytes
        self._data: torch.Tensor | None = None
        self._data_bytes = 0
        self._is_closed = False
        head[:TOKEN_BYTES] = self.token

    @property
    def file(self) -> int:
        """The descriptor that peers open."""
        return self._file

    def send_row(self, reader: int, values: list[int]) -> None:
        """Posts up to ROW - 1 integers."""
        box, number = self._boxes[reader], self._rows_sent[reader] + 1
        row = box.rows[number % RING]
        row[1 : 1 + len(values)] = values
        row[0] = number
        self._rows_sent[reader] = number
        box.rows_posted.post()

    def write(self, reader: int, message: torch.Tensor) -> None:
        """Copies a message, uint8 [B], which is to be posted. Raises OSError when memory for it cannot be had."""
        box, number, size = self._boxes[reader], self._data_sent[reader] + 1, message.shape[0]
        slot = number % RING
        offset, room = self._regions.get((reader, slot), (0, 0))
        if room < size:
            offset = self._grow(reader, slot, size)
        assert self._data is not None
        _copy(message, self._data[offset : offset + size])
        box.descriptors[slot, 1:3] = (offset, size)
        box.descriptors[slot, 0] = number
        self._data_sent[reader] = number

    def post(self, reader: int) -> None:
        """Wakes the reader of a message that was written."""
        self._boxes[reader].data_posted.post()

    def close(self) -> None:
        """Tells every reader that nothing more comes; what was sent can still be read. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        for box in self._boxes:
            box.closed[0] = 1
            box.rows_posted.post()
            box.data_posted.post()
        # The mappings go with the last that looks into them.
        self._boxes.clear()
        self._data = None
        os.close(self._file)

    def _grow(self, reader: int, slot: int, size: int) -> int:
        """A region of at least `size` bytes at the end of the file; its offset within the data."""
        room = max(_SMALLEST_REGION, 1 << (size - 1).bit_length())
        offset = self._data_bytes
        # Not merely a longer file: memory that is not there must be an error here and not a signal at the first write.
        os.posix_fallocate(self._file, self._head_bytes + offset, room)
        self._regions[reader, slot] = (offset, room)
        self._data_bytes = offset + room
        self._data = _map_data(self._file, self._head_bytes, self._data_bytes)
        return offset


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
        self._data_read = 0
        self._data: torch.Tensor | None = None

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

    def take(self, out: torch.Tensor) -> bool:
        """Copies the next message into uint8 `out`; False when there is none. Raises ValueError on another size."""
        number = self._data_read + 1
        written, offset, size, _ = self._box.descriptors[number % RING].tolist()
        if written != number:
            return False
        if size != out.shape[0]:
            raise ValueError(f"a message of {size} bytes came where {out.shape[0]} were due")
        if self._data is None or self._data.shape[0] < offset + size:
            self._data = _map_data(self._file, self._head_bytes, os.fstat(self._file).st_size - self._head_bytes)
        _copy(self._data[offset : offset + size], out)
        self._data_read = number
        return True

    def close(self) -> None:
        """Lets go of the peer's memory."""
        self._data = None
        os.close(self._file)


def _copy(source: torch.Tensor, target: torch.Tensor) -> None:
    """Bytes to bytes, on the calling thread: a team that a copy waits for may have to wait for its core, which the one
    that the message is for has just been woken on. Raises ValueError on another size."""
    size = source.shape[0]
    if target.shape[0] != size:
        raise ValueError(f"{size} bytes do not fit in {target.shape[0]}")
    assert source.dtype is target.dtype is torch.uint8, "bytes"
    assert source.is_contiguous(), "bytes lie one after another"
    assert target.is_contiguous(), "bytes lie one after another"
    ctypes.memmove(target.data_ptr(), source.data_ptr(), size)


def _head_bytes(world_size: int) -> int:
    size = _HEAD + world_size * _BOX
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE


def _int64(memory: mmap.mmap, offset: int, count: int) -> npt.NDArray[np.int64]:
    return np.frombuffer(memory, np.int64, count, offset)


def _map_data(file: int, head_bytes: int, size: int) -> torch.Tensor:
    """The data regions as uint8 [size]; mapped as long as the tensor or a view of it lives."""
    return torch.frombuffer(mmap.mmap(file, size, offset=head_bytes), dtype=torch.uint8)
