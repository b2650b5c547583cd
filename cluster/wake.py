"""How an idle cell sleeps: every rank blocks on one key of the epoch's store, and any rank may set it.

When no rank has a token, all ranks know it from the same headers, so all wait for the same key `wake/G`,
where G counts the sleeps of this epoch. Setting a key twice is harmless, so any number of ranks may ring.

    step thread:  headers all zero -> sleep(): wait(wake/G) ............ returns -> G + 1
    front end:                                 new request -> ring(): set(wake/G)

A rank that rang forgets its key after its next sleep: whoever woke from wake/(G+1) saw headers of all ranks since
wake/G, so nobody waits for that key or sets it any more. The store stays as small as it was.
"""

import threading
from collections.abc import Callable
from datetime import timedelta

from torch._C._distributed_c10d import Store  # torch.distributed has it, but its stubs do not export it
from torch.distributed import DistStoreError

from model_shards.errors import EpochAbortedError

# A wait is cut into slices so that a store whose machine vanished without a word is noticed; torch warns at the end of
# each.
_SLICE = timedelta(minutes=5)


class WakeBell:
    """The bell of one epoch, on one rank. `sleep` is for the step thread, `ring` for any thread."""

    def __init__(self, waiting: Store, ringing: Store) -> None:
        """`waiting` and `ringing` are two connections to one store: a blocked wait holds its connection."""
        self._waiting = waiting
        self._ringing = ringing
        self._lock = threading.Lock()
        self._generation = 0
        self._sleeping = False
        self._rang: list[str] = []  # keys this rank has set and not deleted

    def sleep(self, has_news: Callable[[], bool]) -> None:
        """Blocks until any rank rings. `has_news` is asked once asleep, so that no ring is lost.

        Raises EpochAbortedError when the store, and so rank 0, is gone.
        """
        with self._lock:
            self._sleeping = True
        try:
            if has_news():
                self.ring()
            self._wait(f"wake/{self._generation}")
            self._forget_keys()
        except (RuntimeError, OSError) as error:
            raise EpochAbortedError(f"the epoch's store is gone while idle: {error}") from error
        finally:
            with self._lock:
                self._sleeping = False
                self._generation += 1

    def ring(self) -> None:
        """Wakes every rank if this one sleeps; else the step thread will see the news itself.

        A store that is gone is not an error here: the step thread meets the same fault and reports it.
        """
        with self._lock:
            if not self._sleeping:
                return
            key = f"wake/{self._generation}"
            if key in self._rang:
                return
            try:
                self._ringing.set(key, "1")
            except (RuntimeError, OSError):
                return
            self._rang.append(key)

    def _forget_keys(self) -> None:
        """Deletes what this rank set before the sleep that just ended."""
        with self._lock:
            awoken = f"wake/{self._generation}"
            over = [key for key in self._rang if key != awoken]
            self._rang = [key for key in self._rang if key == awoken]
        # Not under the lock, which `ring` takes on the event loop: the store answers each.
        for key in over:
            self._waiting.delete_key(key)

    def _wait(self, key: str) -> None:
        while True:
            try:
                self._waiting.wait([key], _SLICE)
                return
            except DistStoreError as error:
                if "timeout" not in str(error).lower():
                    raise
