"""Bytes of tensors from a safetensors file, checked against the sum that a cut checkpoint has for them."""

import hashlib
import os
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Self

from blake3 import blake3

from model_shards.errors import CheckpointError
from model_shards.weights.header import StoredTensor
from model_shards.weights.runs import Run

# What a disk is asked for ahead of what is read.
AHEAD_BYTES = 2**25

REMEDY = "copy the file again, or delete it and run the same `shoal shard` again, which cuts it anew"


def open_weights(file: Path) -> FileIO:
    """Without a buffer: all reads are large, and what a buffer reads ahead is lost at the next seek.

    Raises CheckpointError.
    """
    try:
        return file.open("rb", buffering=0)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error


class ReadAhead:
    """Asks the system for the runs that are read next, in order, while one is copied out of its cache.

    By itself it reads ahead within one run of bytes, and little: a slice is many runs of many files, and each would be
    waited for. Leaving it closes the files.
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        """All that will be read, in that order, file after file."""
        self._ahead = deque(runs)
        self._asked = 0  # bytes that were asked for and whose reading has not begun
        self._streams: dict[Path, FileIO] = {}  # in the order of their first runs

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for stream in self._streams.values():
            stream.close()

    def begin(self, run: Run) -> FileIO:
        """The file of this run, which is read next. Raises CheckpointError for one that cannot be opened, which may be
        that of a run further on."""
        while self._ahead and self._asked < AHEAD_BYTES:
            following = self._ahead.popleft()
            self._asked += following.num_bytes
            if following.file not in self._streams:
                self._streams[following.file] = open_weights(following.file)
            _ask_for(self._streams[following.file], following)
        self._asked -= run.num_bytes
        return self._streams[run.file]

    def end(self, run: Run) -> None:
        """This one and all before it have been read: files before its own are closed."""
        while (done := next(iter(self._streams))) != run.file:
            self._streams.pop(done).close()


def _ask_for(stream: FileIO, run: Run) -> None:
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):  # whether it can be read shows when it is
            os.posix_fadvise(stream.fileno(), run.start, run.num_bytes, os.POSIX_FADV_WILLNEED)


class TensorReader:
    """One tensor of an open file, from its first byte to its last, checked on the way."""

    def __init__(self, stream: FileIO, tensor: StoredTensor) -> None:
        self._stream = stream
        self._tensor = tensor
        self._position = tensor.start
        self._digest = None if tensor.blake3 is None else blake3()

    def read_into(self, target: memoryview) -> None:
        """Fills `target` with the next bytes. The last byte of the tensor read, they are all checked.

        Raises CheckpointError naming file and tensor: for a read that fails or ends early, and for bytes that are not
        those that were written, with both sums.
        """
        _fill([target], self._stream, self._position, [self._tensor])
        self._position += len(target)
        if self._digest is not None:
            self._digest.update(target)
            if self._position == self._tensor.start + self._tensor.num_bytes:
                _compare(self._tensor, self._digest.hexdigest())


def read_run(stream: FileIO, tensors: Sequence[StoredTensor], targets: Sequence[memoryview]) -> None:
    """Fills the targets with all bytes of these tensors, which lie one behind the other, and checks them against their
    sums, where a manifest has some. Any thread may.

    Raises CheckpointError naming file and tensor, for a read that fails or ends early, and for bytes that are not those
    that were written, with both sums.
    """
    _fill(targets, stream, tensors[0].start, tensors)
    for tensor, target in zip(tensors, targets, strict=True):
        if tensor.blake3 is not None:
            _compare(tensor, blake3(target).hexdigest())


def _fill(targets: Sequence[memoryview], stream: FileIO, position: int, tensors: Sequence[StoredTensor]) -> None:
    """Bytes from `position` on; each target is of the tensor of its place."""
    left = deque((target, tensor) for target, tensor in zip(targets, tensors, strict=True) if target)
    try:
        while left:
            # By position: other threads read from the same file.
            count = os.preadv(stream.fileno(), [target for target, _ in left], position)
            target, tensor = left[0]
            if not count:
                raise CheckpointError(f"{tensor.file} became shorter while tensor {tensor.name} was read from it")
            position += count
            while left and count >= len(left[0][0]):
                count -= len(left.popleft()[0])
            if count:  # the system may give less than was asked in one read
                target, tensor = left.popleft()
                left.appendleft((target[count:], tensor))
    except OSError as error:
        tensor = left[0][1]
        raise CheckpointError(f"{tensor.file} cannot be read at tensor {tensor.name}: {error.strerror}") from error


def _compare(tensor: StoredTensor, found: str) -> None:
    if found != tensor.blake3:
        raise CheckpointError(
            f"{tensor.file} is damaged: tensor {tensor.name} must have BLAKE3 {tensor.blake3}, found {found}; {REMEDY}"
        )


def check_file(file: Path, num_bytes: int, sha256: str) -> None:
    """A whole file. Raises CheckpointError with what was expected and found."""
    try:
        with file.open("rb") as stream:
            size = file.stat().st_size
            found = hashlib.file_digest(stream, "sha256").hexdigest()
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing, and the manifest beside it names it; {REMEDY}") from None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    if size != num_bytes:
        raise CheckpointError(f"{file} is truncated or changed: it must have {num_bytes} bytes, found {size}; {REMEDY}")
    if found != sha256:
        raise CheckpointError(f"{file} is damaged or changed: it must have SHA-256 {sha256}, found {found}; {REMEDY}")
