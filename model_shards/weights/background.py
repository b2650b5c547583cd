"""Tensors read, and checked against their sums, by threads of their own."""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from types import TracebackType
from typing import Self

from model_shards.weights.header import StoredTensor
from model_shards.weights.reading import check_tensor, read_unchecked

# One copies slower than a fast disk reads: memory is touched there for the first time, and what was read is summed.
# Both release the interpreter's lock.
_THREADS = 2
# So few that damage is told soon.
_MOST_WAITING = 4
# Tensors are handed over together until they have as much: a thread is woken for no less.
_BYTES_OF_A_TURN = 2**20


@dataclass(frozen=True)
class _Read:
    stream: FileIO
    tensor: StoredTensor
    target: memoryview

    def run(self) -> None:
        read_unchecked(self.stream, self.tensor, self.target)
        check_tensor(self.tensor, self.target)


class BackgroundReads:
    """Leaving it waits for all reads that were added; left by an error, it forgets those that have not begun."""

    def __init__(self, on_read: Callable[[StoredTensor], None]) -> None:
        """`on_read` is told each tensor that was read and checked, in their order, on the caller's thread."""
        self._on_read = on_read
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="read-weights")
        self._gathered: list[_Read] = []
        self._gathered_bytes = 0
        self._waiting: deque[tuple[Sequence[_Read], Future[None]]] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            self._pool.shutdown(cancel_futures=True)

    def add(self, stream: FileIO, tensor: StoredTensor, target: memoryview) -> None:
        """Fills `target` with all bytes of a tensor. The file must stay open until `on_read` is told, and nobody may
        look at `target`.

        Raises CheckpointError for a tensor that was added before: the first that cannot be read or is damaged.
        """
        self._gathered.append(_Read(stream, tensor, target))
        self._gathered_bytes += tensor.num_bytes
        if self._gathered_bytes >= _BYTES_OF_A_TURN:
            self._hand_over()
            self._wait(_MOST_WAITING)

    def finish(self) -> None:
        """Waits for all that were added. Raises as `add` does."""
        if self._gathered:
            self._hand_over()
        self._wait(0)

    def _hand_over(self) -> None:
        reads, self._gathered, self._gathered_bytes = self._gathered, [], 0
        self._waiting.append((reads, self._pool.submit(_run_all, reads)))

    def _wait(self, most: int) -> None:
        while len(self._waiting) > most:
            reads, future = self._waiting.popleft()
            future.result()
            for read in reads:
                self._on_read(read.tensor)


def _run_all(reads: Sequence[_Read]) -> None:
    for read in reads:
        read.run()
