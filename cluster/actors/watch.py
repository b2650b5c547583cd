"""Ends a process when a task that must run for ever did not: Ray starts it again; half dead it helps nobody."""

import asyncio
import logging
import os
from collections.abc import Callable, Coroutine

from cluster.logs import log_event

logger = logging.getLogger(__name__)


def run_for_ever(
    work: Coroutine[None, None, None], name: str, end_process: Callable[[int], object] = os._exit
) -> asyncio.Task[None]:
    """Starts `work` as a task; when it raises or returns, that is logged and `end_process(1)` is called.

    Keep the task; cancelling it is the orderly way to stop it.
    """

    def done(task: asyncio.Task[None]) -> None:
        if task.cancelled():
            return
        error = task.exception()
        if error is None:
            log_event(logger, "task ended", logging.CRITICAL, task=name)
        else:
            logger.critical("task failed", exc_info=error, extra={"fields": {"task": name}})
        end_process(1)

    task = asyncio.get_running_loop().create_task(work, name=name)
    task.add_done_callback(done)
    return task
