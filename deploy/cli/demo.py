"""`python -m deploy.cli.demo`, what `make demo` runs: a whole service, one question, a clean stop.

It uses `shoal serve` as a user does: a process of its own, found by its `ready` line, stopped by SIGTERM.
"""

import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

import click
import psutil

from deploy.cli.conversation import Conversation
from deploy.cli.failure import failure_of
from deploy.client import Sampling, ShoalClient
from model_shards.errors import ShoalError, UnavailableError

QUESTION = "What is a whale?"
MAX_TOKENS = 64
START_S = 180.0
STOP_S = 60.0
_KILL_AFTER_S = 15.0
SERVE = (
    *(sys.executable, "-m", "deploy.cli.main", "serve"),
    *("--attention-replicas", "1", "--expert-shards", "2", "--grpc-port", "0", "--http-port", "0"),
)
_READY = re.compile(r"shoal: ready grpc=(\S+) http=(\S+) model=(\S+)")


def run_demo(command: tuple[str, ...] = SERVE, start_s: float = START_S, stop_s: float = STOP_S) -> None:
    """Starts `command`, asks, stops. Raises a ShoalError for whatever did not work."""
    begun = time.monotonic()
    click.echo(f"shoal: demo: 1 attention replica and 2 expert shards on CPU; `{' '.join(command[1:])}`", err=True)
    with _child(command) as process:
        address = _wait_until_ready(process, start_s)
        started_s = time.monotonic() - begun
        click.echo(f"shoal: demo: asking over gRPC at {address}: {QUESTION}", err=True)
        with ShoalClient(address) as client:
            sampling = Sampling(max_tokens=MAX_TOKENS, temperature=0.0)
            if not Conversation(client, "", None, sampling).ask(QUESTION):
                raise UnavailableError("the answer was cancelled before its end")
        begun = time.monotonic()
        process.send_signal(signal.SIGTERM)
        try:
            status = process.wait(stop_s)
        except subprocess.TimeoutExpired:
            raise UnavailableError(f"the service did not stop within {stop_s:.0f} s of SIGTERM") from None
        if status != 0:
            raise UnavailableError(f"the service stopped with exit status {status} instead of 0")
    click.echo(
        f"shoal: demo: done; started in {started_s:.1f} s, stopped cleanly in {time.monotonic() - begun:.1f} s",
        err=True,
    )


@contextmanager
def _child(command: tuple[str, ...]) -> Iterator["subprocess.Popen[str]"]:
    """The service, its progress on our stderr; none of its processes outlives the block."""
    # A session of its own: Ctrl-C reaches only this process, which then stops the service in order.
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        yield process
    finally:
        _stop(process)
        assert process.stdout is not None
        process.stdout.close()


def _stop(process: "subprocess.Popen[str]") -> None:
    if process.poll() is not None:
        return
    descendants = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    try:
        process.wait(_KILL_AFTER_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for descendant in descendants:
        # psutil compares creation times, so a number that was given to another process since is left alone.
        if descendant.is_running():
            _kill(descendant)


def _kill(process: psutil.Process) -> None:
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return


def _wait_until_ready(process: "subprocess.Popen[str]", start_s: float) -> str:
    """The gRPC address of the `ready` line. Raises UnavailableError when it does not come."""
    lines: queue.Queue[str | None] = queue.Queue()
    stdout = process.stdout
    assert stdout is not None

    def read() -> None:
        # Reads on after `ready`, so that the service never blocks on a full pipe.
        for line in stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, name="demo-stdout", daemon=True).start()
    deadline = time.monotonic() + start_s
    while True:
        try:
            line = lines.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            raise UnavailableError(f"the service was not ready within {start_s:.0f} s") from None
        if line is None:
            raise UnavailableError(
                f"the service ended before it was ready, with exit status {process.wait(10.0)}; it says why above"
            )
        click.echo(line, nl=False, err=True)
        match = _READY.match(line)
        if match:
            return match[1]


def _interrupted(_number: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def main() -> None:
    """Exits 0 when everything worked, 1 otherwise."""
    signal.signal(signal.SIGTERM, _interrupted)
    try:
        run_demo()
    except ShoalError as error:
        failure_of(error).show()
        click.echo("shoal: demo: failed", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        click.echo("shoal: demo: interrupted", err=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
