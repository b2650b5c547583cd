"""What the processes of a cell write, as it is, on this process's stderr.

Shoal's lines already say role and rank, and need none of the prefixes and colours that Ray adds; and Ray prints errors
of its own on stdout, which is kept for the `ready` line. Ray has no setting for either: its driver hands every line of
every worker to the handlers of one dispatcher, where this takes the place of the one that prints.
"""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray._private.worker as ray_worker
from ray._private.ray_logging import global_worker_stdstream_dispatcher

_HANDLER = "shoal"
_AUTOSCALER = "autoscaler"  # reports every 5 s that there is nothing to report
# As cluster.logs writes them.
_SHOAL_LINE = re.compile(r"\d{4}-\d\d-\d\dT[\d:.]+Z [A-Z]+ role=")


@contextmanager
def worker_logs() -> Iterator[None]:
    """Inside the block, which begins after ray.init, the lines of all workers go to stderr."""
    ray_worker._worker_logs_enabled = False
    global_worker_stdstream_dispatcher.add_handler(_HANDLER, _write)
    try:
        yield
    finally:
        global_worker_stdstream_dispatcher.remove_handler(_HANDLER)
        # Ray's own printing stays off: all it has to say from here on is that what we stop has stopped.


def _write(data: dict[str, Any]) -> None:
    """One batch of one process: its `lines`, and who wrote them."""
    if data.get("pid") == _AUTOSCALER:
        return
    origin = data.get("actor_name") or data.get("task_name") or "ray"
    lines = [line if _SHOAL_LINE.match(line) else f"{origin}: {line}" for line in data.get("lines", ())]
    sys.stderr.write("".join(f"{line}\n" for line in lines))
    sys.stderr.flush()
