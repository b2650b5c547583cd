"""Tensors checked against their sums on other threads, while the next ones are read."""

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

from model_shards.weights.header import StoredTensor
from model_shards.weights.reading import check_tensor

# One thread sums slower than a fast disk reads. Hashing and reading both release the interpreter's lock.
_THREADS = 2
# So few that what is summed is still in the processor's caches, and damage is told soon.
_MOST_WAITING = 4


class BackgroundChecks:
    """Leaving it waits for all checks that were added; left by an error, it forgets those that have not begun."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="check-weights")
        self._waiting: deque[Future[None]] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._wait(0)
        finally:
            self._pool.shutdown(cancel_futures=True)

    def add(self, tensor: StoredTensor, data: memoryview) -> None:
        """Checks all bytes of a tensor, which nobody may change until this is left.

        Raises CheckpointError for a tensor that was added before and is damaged, the first of them.
        """
        if tensor.sha256 is not None:
            self._waiting.append(self._pool.submit(check_tensor, tensor, data))
            self._wait(_MOST_WAITING)

    def _wait(self, most: int) -> None:
        while len(self._waiting) > most:
            self._waiting.popleft().result()
