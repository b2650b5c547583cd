"""Ray under the service: one of its own that stops with it, or an existing cluster by address."""

import logging
import os
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import psutil
import ray
from ray import serve

from cluster.actors.client import COORDINATOR_NAME, NAMESPACE
from cluster.actors.coordinator import remove_cell
from cluster.device import RANK_ENVIRONMENT
from cluster.spec import CellSpec
from deploy.config import ShoalSettings
from deploy.launch.signals import StopSignals, kill_children
from deploy.launch.worker_logs import worker_logs
from model_shards.errors import ConfigError, UnavailableError

# The gateway, and Serve's controller and proxies.
_CPUS_BESIDE_RANKS = 4
_CONNECT_S = 10.0
# Ray waits a second for each of its daemons, which SIGTERM does not reach (`kept_from_children`), and kills it then.
_DAEMONS_END_S = 1.0
_DAEMONS = ("gcs_server", "raylet")
_QUIET = {"RAY_DEDUP_LOGS": "0", "RAY_SERVE_LOG_TO_STDERR": "0", "RAY_USAGE_STATS_ENABLED": "0"}
# torch's warnings about a connection or a wait that ended: what they mean is in our own log.
_QUIET |= {"TORCH_CPP_LOG_LEVEL": "ERROR"}
SERVE_ENVIRONMENT = {
    # Serve's calls and streams go over gRPC: half the CPU time of Ray's streams of objects for each chunk to a client.
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    # The gateway, the replicas and their routers on Serve's own event loop: what takes long has threads of its own, and
    # where ranks compute on all cores each change of threads costs a first token milliseconds (benchmarks/NOTES.md).
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
}
_SERVE_CONTROLLER = ("SERVE_CONTROLLER_ACTOR", "serve")


class RayRuntime:
    """The Ray that the service stands on."""

    def __init__(self, daemons: tuple[psutil.Process, ...]) -> None:
        self._daemons = daemons

    def lost(self) -> str | None:
        """Which of our own daemons has ended, if any; on an existing cluster Ray itself ends this process then."""
        for daemon in self._daemons:
            try:
                if daemon.status() != psutil.STATUS_ZOMBIE:
                    continue
            except psutil.NoSuchProcess:
                pass
            return f"process {daemon.pid}"
        return None


@contextmanager
def ray_runtime(
    settings: ShoalSettings, front: Mapping[str, str], spec: CellSpec, signals: StopSignals
) -> Iterator[RayRuntime]:
    """Ray is connected inside the block; `front` is what its processes need of `deploy.launch.haproxy`.

    Raises UnavailableError when ray.address does not answer, ConfigError when that cluster is taken.
    """
    address = settings.ray.address
    # What the operator set of the ranks' environment stays.
    ranks = {name: os.environ.get(name, value) for name, value in RANK_ENVIRONMENT.items()}
    environment = {**front, **SERVE_ENVIRONMENT, **ranks}
    os.environ.update(environment | _QUIET)
    # What Ray's and Serve's own code says in this process; trouble comes as an exception.
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with signals.kept_from_children():
            if address is None:
                _start(spec)
            else:
                _connect(address, environment)
        if address is not None:
            _take(address, settings.ray.replace, spec)
        with worker_logs():
            yield RayRuntime(_own_daemons() if address is None else ())
    finally:
        _stop(own=address is None)


def _start(spec: CellSpec) -> None:
    try:
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
    except Exception as error:  # Ray raises bare ones when a daemon of its own does not come up
        raise UnavailableError(f"Ray did not start on this machine: {' '.join(str(error).split())}") from error


def _own_daemons() -> tuple[psutil.Process, ...]:
    return tuple(child for child in psutil.Process().children() if child.name() in _DAEMONS)


def _stop(own: bool) -> None:
    if not own:
        ray.shutdown()
        return
    hurry = threading.Timer(_DAEMONS_END_S, kill_children)
    hurry.start()
    try:
        ray.shutdown()
    finally:
        hurry.cancel()
        hurry.join()
        kill_children()


def _connect(address: str, environment: dict[str, str]) -> None:
    _check_answers(address)
    try:
        ray.init(address=address, namespace=NAMESPACE, logging_level="ERROR", runtime_env={"env_vars": environment})
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UnavailableError(f"no Ray cluster answers at ray.address {address}: {error}") from error


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


def _take(address: str, replace: bool, spec: CellSpec) -> None:
    """A cluster takes one cell, and one Serve, whose ports are its first starter's."""
    taken_by = [what for what, actor in _TAKERS.items() if _exists(*actor)]
    if not taken_by:
        return
    if not replace:
        raise ConfigError(
            f"the Ray cluster at {address} already runs {' and '.join(taken_by)}; stop that first, "
            "or let `--set ray.replace=true` take it down, with everything that it serves"
        )
    serve.shutdown()
    remove_cell(spec)


_TAKERS = {"a Shoal cell": (COORDINATOR_NAME, NAMESPACE), "Ray Serve": _SERVE_CONTROLLER}


def _exists(name: str, namespace: str) -> bool:
    try:
        ray.get_actor(name, namespace=namespace)
    except ValueError:
        return False
    return True
