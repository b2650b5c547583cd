"""Ray under the service: one of its own that stops with it, or an existing cluster by address."""

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from cluster.actors.client import COORDINATOR_NAME, NAMESPACE
from cluster.spec import CellSpec
from deploy.app.bind import proxy_environment
from deploy.config import ShoalSettings
from deploy.launch.worker_logs import worker_logs
from model_shards.errors import ConfigError, UnavailableError

# The gateway, and Serve's controller and proxies.
_CPUS_BESIDE_RANKS = 4
_CONNECT_S = 10.0
_QUIET = {"RAY_DEDUP_LOGS": "0", "RAY_SERVE_LOG_TO_STDERR": "0", "RAY_USAGE_STATS_ENABLED": "0"}


@contextmanager
def ray_runtime(settings: ShoalSettings, spec: CellSpec) -> Iterator[None]:
    """Ray is connected inside the block.

    Raises UnavailableError when ray.address does not answer, ConfigError when that cluster already runs a cell.
    """
    environment = dict(proxy_environment(settings.server.host))
    os.environ.update(environment | _QUIET)
    # What Ray's and Serve's own code says in this process; trouble comes as an exception.
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        if settings.ray.address is None:
            _start(spec)
        else:
            _connect(settings.ray.address, environment)
        with worker_logs():
            yield
    finally:
        ray.shutdown()


def _start(spec: CellSpec) -> None:
    ray.init(
        address="local",
        # CPUs are only places here: every rank takes one, and so do the gateway and Serve's own actors.
        num_cpus=spec.topology.world_size + _CPUS_BESIDE_RANKS,
        namespace=NAMESPACE,
        include_dashboard=False,
        log_to_driver=True,
        logging_level="ERROR",
        _node_ip_address="127.0.0.1",
    )


def _connect(address: str, environment: dict[str, str]) -> None:
    _check_answers(address)
    try:
        ray.init(address=address, namespace=NAMESPACE, logging_level="ERROR", runtime_env={"env_vars": environment})
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UnavailableError(f"no Ray cluster answers at ray.address {address}: {error}") from error
    try:
        ray.get_actor(COORDINATOR_NAME, namespace=NAMESPACE)
    except ValueError:
        return
    raise ConfigError(f"the Ray cluster at {address} already runs a Shoal cell, and takes one; stop that one first")


def _check_answers(address: str) -> None:
    """Ray waits for minutes where nobody listens; "auto" and the like it resolves by itself."""
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        return
    try:
        with socket.create_connection((host.strip("[]"), int(port)), _CONNECT_S):
            return
    except (OSError, OverflowError) as error:
        raise UnavailableError(f"no Ray cluster answers at ray.address {address}: {error}") from error
