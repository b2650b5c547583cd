"""Notices that a peer's process is gone, however it went (pidfd_open(2))."""

import os
import select
import threading
from collections.abc import Callable, Mapping


class ProcessWatch:
    """Calls `on_exit(rank)` from a thread of its own when the process of a rank has exited; a context manager.

    Raises OSError when constructed if one of the processes is gone already.
    """

    def __init__(self, processes: Mapping[int, int], on_exit: Callable[[int], None]) -> None:
        """`processes`: rank -> process id."""
        self._on_exit = on_exit
        self._ranks: dict[int, int] = {}  # file descriptor -> rank
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        try:
            for rank, process in processes.items():
                self._ranks[os.pidfd_open(process)] = rank
        except BaseException:
            self._close_files()
            raise
        self._thread = threading.Thread(target=self._run, name="peer-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread."""
        os.eventfd_write(self._stop, 1)
        self._thread.join()
        self._close_files()

    def _run(self) -> None:
        poll = select.poll()
        for file in (self._stop, *self._ranks):
            poll.register(file, select.POLLIN)
        while True:
            for file, _ in poll.poll():  # no deadline: the process waited for may live for months
                if file == self._stop:
                    return
                poll.unregister(file)
                self._on_exit(self._ranks[file])

    def _close_files(self) -> None:
        for file in (self._stop, *self._ranks):
            os.close(file)
