"""POSIX semaphores that lie in shared memory (sem_overview(7)), by way of the C library: Python has none of these.

`multiprocessing.Semaphore` has a name in a file system and is inherited by fork; these lie in any memory two processes
map. Posting costs no system call unless somebody waits, and a waiter sleeps in the kernel.
"""

import ctypes
import errno
import mmap
import os
import time

SIZE = 32  # bytes, sizeof(sem_t) on 64-bit Linux
CLOCK_MONOTONIC = 1
_FUNCTIONS = ("sem_post", "sem_clockwait", "clock_gettime")


class _Timespec(ctypes.Structure):
    _fields_ = (("tv_sec", ctypes.c_int64), ("tv_nsec", ctypes.c_int64))


_libc = ctypes.CDLL(None, use_errno=True)


def functions() -> dict[str, int]:
    """Where those of the C library are that compiled code posts and waits with, and tells the time by."""
    found = {name: ctypes.cast(getattr(_libc, name), ctypes.c_void_p).value for name in _FUNCTIONS}
    return {name: address for name, address in found.items() if address is not None}


def available() -> bool:
    """Whether the C library can wait by the monotonic clock (glibc 2.30 or later)."""
    return hasattr(_libc, "sem_clockwait")


class Semaphore:
    """One semaphore at an offset of a shared mapping, which it keeps mapped. `create` exactly once, before any use."""

    def __init__(self, memory: mmap.mmap, offset: int, *, create: bool = False) -> None:
        self._bytes = (ctypes.c_char * SIZE).from_buffer(memory, offset)
        self._address = ctypes.c_void_p(ctypes.addressof(self._bytes))
        if create and _libc.sem_init(self._address, 1, 0):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    @property
    def address(self) -> int:
        """Where it is in this process."""
        return ctypes.addressof(self._bytes)

    def post(self) -> None:
        """Adds one; never blocks."""
        if _libc.sem_post(self._address):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    def wait(self, deadline: float) -> bool:
        """Takes one; False when there is none until `deadline` on time.monotonic()'s clock."""
        if not _libc.sem_trywait(self._address):
            return True
        limit = _Timespec(int(deadline), int(deadline % 1 * 1e9))
        while _libc.sem_clockwait(self._address, CLOCK_MONOTONIC, ctypes.byref(limit)):
            code = ctypes.get_errno()
            if code == errno.ETIMEDOUT and time.monotonic() >= deadline:
                return False
            if code not in (errno.EINTR, errno.ETIMEDOUT):
                raise OSError(code, os.strerror(code))
        return True
