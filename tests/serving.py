"""Starts the real service as a user does: `shoal serve` in a process of its own, on free loopback ports."""

import contextlib
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import psutil

READY = re.compile(r"^shoal: ready grpc=(\S+) http=(\S+) model=(\S+)$")
START_S = 180.0
# Of the service that tests share (tests/integration/conftest.py).
MAX_MODEL_LEN = 4096
MAX_NUM_SEQS = 4
MAX_CONCURRENT_REQUESTS = 16
STOP_S = 60.0


@dataclass
class Service:
    """A running `shoal serve`."""

    process: "subprocess.Popen[str]"
    started_s: float = 0.0
    grpc: str = ""
    http: str = ""
    model: str = ""
    output: list[str] = field(default_factory=list)

    def descendants(self) -> list[psutil.Process]:
        """All processes below it."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Sends a signal and waits; the exit status."""
        self.process.send_signal(number)
        return self.process.wait(STOP_S)


def serve_command(*arguments: str) -> list[str]:
    """The command line of a service on free ports."""
    return [sys.executable, "-m", "deploy.cli.main", "serve", "--grpc-port", "0", "--http-port", "0", *arguments]


@contextlib.contextmanager
def running_service(*arguments: str) -> Iterator[Service]:
    """A service that is ready; killed with all its processes at the end if it has not been stopped."""
    begun = time.monotonic()
    process = subprocess.Popen(
        serve_command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    service = Service(process)
    ready = threading.Event()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            service.output.append(line.rstrip("\n"))
            match = READY.match(service.output[-1])
            if match:
                service.grpc, service.http, service.model = match.groups()
                ready.set()
        ready.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        assert ready.wait(START_S), "not ready in time:\n" + "\n".join(service.output[-60:])
        assert service.grpc, "the service ended before it was ready:\n" + "\n".join(service.output[-60:])
        service.started_s = time.monotonic() - begun
        yield service
    finally:
        children: list[psutil.Process] = []
        if process.poll() is None:
            children = service.descendants()
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_S)
        if process.poll() is None:
            process.kill()
            process.wait(10.0)
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        reader.join(10.0)
        assert process.stdout is not None
        process.stdout.close()
