"""The one thread of a rank that owns the model and runs epochs, one after another."""

import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from cluster.logs import log_event
from cluster.membership import Membership
from model_shards.errors import EpochAbortedError, UnavailableError

logger = logging.getLogger(__name__)

# run_epoch(membership, global_rank, on_joined): returns at the epoch's orderly end, raises when it is aborted.
RunEpoch = Callable[[Membership, int, Callable[[], None]], None]


@dataclass(frozen=True)
class EpochEnd:
    """How an epoch ended on this rank."""

    epoch: int
    error: str | None  # None at an orderly end
    is_fault: bool  # an error of this rank itself, not a lost peer: running the same step again would not help


OnEpochEnd = Callable[[EpochEnd], None]


@dataclass(frozen=True)
class _Join:
    membership: Membership
    global_rank: int
    joined: "Future[None]"


class EpochThread:
    """Runs `run_epoch` for each membership handed to `join`. A context manager; `close` ends the thread.

    The caller must make a running epoch return (by its own stop flag) before the next `join` can start.
    """

    def __init__(self, name: str, run_epoch: RunEpoch, on_epoch_end: OnEpochEnd) -> None:
        self._run_epoch = run_epoch
        self._on_epoch_end = on_epoch_end
        self._commands: queue.SimpleQueue[_Join | None] = queue.SimpleQueue()
        # A daemon: a thread stuck in a collective must not keep a dying process alive.
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def join(
        self, membership: Membership, global_rank: int, on_done: "Callable[[Future[None]], None] | None" = None
    ) -> "Future[None]":
        """Asks for an epoch; the future is done once this rank's process groups stand, or holds the error.

        `on_done` is called with it then, from the thread and before `on_epoch_end` is.
        """
        joined: Future[None] = Future()
        if on_done is not None:
            joined.add_done_callback(on_done)
        self._commands.put(_Join(membership, global_rank, joined))
        return joined

    def close(self, timeout_s: float) -> bool:
        """Ends the thread after the current epoch; whether it ended within `timeout_s` seconds."""
        self._commands.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (command := self._commands.get()) is not None:
            # Only the newest: the peers of an older one have moved on, and waiting for them takes its whole timeout.
            while not self._commands.empty():
                newer = self._commands.get()
                self._supersede(command)
                if newer is None:
                    return
                command = newer
            self._run_one(command)

    def _supersede(self, command: _Join) -> None:
        error = f"epoch {command.membership.epoch} was superseded before this rank joined it"
        if command.joined.set_running_or_notify_cancel():
            command.joined.set_exception(UnavailableError(error))
        self._on_epoch_end(EpochEnd(command.membership.epoch, error, is_fault=False))

    def _run_one(self, command: _Join) -> None:
        epoch = command.membership.epoch
        error: str | None = None
        is_fault = False
        # After this the future cannot be cancelled any more: who waited for it may be gone, and that is no fault.
        awaited = command.joined.set_running_or_notify_cancel()

        def on_joined() -> None:
            if awaited:
                command.joined.set_result(None)

        try:
            self._run_epoch(command.membership, command.global_rank, on_joined)
        except EpochAbortedError as aborted:
            error = str(aborted)
            log_event(logger, "epoch aborted", logging.WARNING, epoch=epoch, error=error)
        except Exception as fault:  # the thread is the process's heart: whatever happened, the owner must learn it
            error = f"{type(fault).__name__}: {fault}"
            is_fault = True
            logger.exception("epoch failed", extra={"fields": {"epoch": epoch}})
        if not command.joined.done():
            command.joined.set_exception(UnavailableError(error or f"epoch {epoch} ended before it was joined"))
        self._on_epoch_end(EpochEnd(epoch, error, is_fault))
