"""SIGINT and SIGTERM of a process that runs a service: the first stops it in order, the second at once."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Self

import psutil

_NUMBERS = (signal.SIGINT, signal.SIGTERM)


class StartInterrupted(BaseException):
    """A signal came during the start: unwind, and stop what stands. Not an Exception: nothing may swallow it."""


class StopSignals:
    """First signal: `wait` returns, or the start is interrupted. Second: all our processes end at once, status 1.

    installed() { interrupting() { the start } wait() the stop }
    """

    def __init__(self) -> None:
        self._event = threading.Event()
        self._starting = False

    @contextmanager
    def installed(self) -> Iterator[Self]:
        """Handles both signals inside the block. Main thread only."""
        old = {number: signal.signal(number, self._handle) for number in _NUMBERS}
        try:
            yield self
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    @contextmanager
    def kept_from_children(self) -> Iterator[None]:
        """Processes that are started inside the block, and theirs, get no SIGTERM; this one gets it after the block.

        A SIGTERM to our whole process group, as supervisors send it, must find Ray alive: without it nothing could be
        drained. SIGINT Ray keeps from its processes by itself.
        """
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            yield
        finally:
            # Ray puts a handler of its own in place of ours.
            for number in _NUMBERS:
                signal.signal(number, self._handle)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """Inside the block the first signal raises StartInterrupted in the main thread.

        Whatever becomes of it there, a block during which or before which a signal came ends with StartInterrupted:
        raised inside an import or Ray's compiled code it may be swallowed, or come out as another exception.
        """
        self._starting = True
        try:
            self._check()
            yield
            self._check()
        except BaseException as error:
            if not self.raised or isinstance(error, StartInterrupted):
                raise
            raise StartInterrupted from error
        finally:
            self._starting = False

    @property
    def raised(self) -> bool:
        """Whether a signal came."""
        return self._event.is_set()

    def wait(self, timeout_s: float) -> bool:
        """Blocks for a signal; whether one came."""
        return self._event.wait(timeout_s)

    def _check(self) -> None:
        if self.raised:
            raise StartInterrupted

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        if self._event.is_set():
            kill_children()
            os._exit(1)
        self._event.set()
        if self._starting:
            raise StartInterrupted


def kill_children() -> None:
    """Kills every descendant process; they are all ours, as this process started them."""
    for child in psutil.Process().children(recursive=True):
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue
