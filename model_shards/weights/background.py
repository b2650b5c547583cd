"""Runs read, and their tensors checked against their sums, by threads of their own."""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from io import FileIO
from types import TracebackType
from typing import Self

from model_shards.weights.reading import read_run
from model_shards.weights.runs import Run

# One copies slower than a fast disk reads: memory is touched there for the first time, and what was read is summed.
# Both release the interpreter's lock.
_THREADS = 2
# So few that damage is told soon.
_MOST_WAITING = 4


class BackgroundReads:
    """Leaving it waits for all reads that were added; left by an error, it forgets those that have not begun."""

    def __init__(self, on_read: Callable[[Run], None]) -> None:
        """`on_read` is told each run that was read and checked, in their order, on the caller's thread."""
        self._on_read = on_read
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="read-weights")
        self._waiting: deque[tuple[Run, Future[None]]] = deque()

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

    def add(self, stream: FileIO, run: Run, targets: Sequence[memoryview]) -> None:
        """Fills `targets` with all bytes of the run's tensors. The file must stay open until `on_read` is told, and
        nobody may look at the targets.

        Raises CheckpointError for a run that was added before: the first tensor that cannot be read or is damaged.
        """
        self._waiting.append((run, self._pool.submit(read_run, stream, run.tensors, targets)))
        self._wait(_MOST_WAITING)

    def finish(self) -> None:
        """Waits for all that were added. Raises as `add` does."""
        self._wait(0)

    def _wait(self, most: int) -> None:
        while len(self._waiting) > most:
            run, future = self._waiting.popleft()
            future.result()
            self._on_read(run)
