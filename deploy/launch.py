"""Starts, watches and stops the whole service in the foreground: what `shoal serve` runs.

    ray (own or existing) -> coordinator and expert actors -> Serve, its proxies, the application
    -> a real token through every expert shard -> ready -> a signal -> drain -> everything stopped
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType

import grpc
import psutil
import ray
from ray import serve
from ray.serve.config import HTTPOptions, ProxyLocation, gRPCOptions
from ray.serve.schema import LoggingConfig

from cluster.actors.client import NAMESPACE
from cluster.actors.coordinator import expert_actor_name, get_or_create_coordinator
from cluster.control import CellStatus
from cluster.spec import CellSpec
from deploy.app import APP_NAME, SERVICER_FUNCTIONS, build_application
from deploy.app.bind import proxy_environment
from deploy.app.cell_spec import build_cell_spec
from deploy.cli.progress import ServeUi
from deploy.config import ShoalSettings
from deploy.gateway import inference_pb2 as pb
from deploy.gateway.inference_pb2_grpc import InferenceStub
from model_shards.errors import UnavailableError

_WARM_UP_TOKENS = 64
_WARM_UP_TRIES = 8
_CALL_S = 60.0


class StopSignals:
    """First SIGINT or SIGTERM: `wait` returns. Second: this process and its children end at once, with status 1."""

    def __init__(self) -> None:
        self._event = threading.Event()

    @contextmanager
    def installed(self) -> Iterator["StopSignals"]:
        """Handles both signals inside the block, in the main thread."""
        old = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    @property
    def raised(self) -> bool:
        """Whether a signal came."""
        return self._event.is_set()

    def wait(self, timeout_s: float) -> bool:
        """Blocks for a signal; whether one came."""
        return self._event.wait(timeout_s)

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        if self._event.is_set():
            kill_children()
            os._exit(1)
        self._event.set()
        raise_in_start = _StartInterrupted.armed
        if raise_in_start:
            raise _StartInterrupted


class _StartInterrupted(BaseException):
    """A signal came while the service was still starting: unwind and stop what stands."""

    armed = False


def kill_children() -> None:
    """Kills every descendant process; they are all ours, as this process started them."""
    for child in psutil.Process().children(recursive=True):
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue


def run_service(settings: ShoalSettings, ui: ServeUi) -> int:
    """Runs until a signal; returns the exit status. Raises a ShoalError when the start fails."""
    signals = StopSignals()
    with ExitStack() as stack:
        stack.enter_context(signals.installed())
        _StartInterrupted.armed = True
        try:
            spec = build_cell_spec(settings)
            ui.stage("starting Ray")
            stack.enter_context(_ray(settings, spec))
            ui.stage("starting the cell")
            stack.enter_context(_application(settings, spec, ui))
            ui.stage("passing a first token through every expert shard")
            warm_up(settings, spec)
        except _StartInterrupted:
            return 0
        finally:
            _StartInterrupted.armed = False
        host = settings.server.host
        ui.ready(f"{host}:{settings.server.grpc_port}", f"{host}:{settings.server.http_port}", settings.model.name)
        while not signals.wait(3600.0):
            continue
        ui.draining(0)
        _drain(settings)
    return 0


@contextmanager
def _ray(settings: ShoalSettings, spec: CellSpec) -> Iterator[None]:
    """Joins the cluster at ray.address, or starts Ray here and stops it at the end."""
    environment = dict(proxy_environment(settings.server.host))
    quiet = {"RAY_DEDUP_LOGS": "0", "RAY_SERVE_LOG_TO_STDERR": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    os.environ.update(environment | quiet)
    if settings.ray.address is None:
        ray.init(
            address="local",
            # CPUs are only places here: every rank takes one, and so do the gateway and Serve's own actors.
            num_cpus=spec.topology.world_size + 4,
            namespace=NAMESPACE,
            include_dashboard=False,
            log_to_driver=True,
            logging_level="ERROR",
            _node_ip_address="127.0.0.1",
        )
    else:
        ray.init(
            address=settings.ray.address,
            namespace=NAMESPACE,
            logging_level="ERROR",
            runtime_env={"env_vars": environment},
        )
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _application(settings: ShoalSettings, spec: CellSpec, ui: ServeUi) -> Iterator[None]:
    """The coordinator, the expert actors, Serve and the application; all gone at the end."""
    coordinator = get_or_create_coordinator(spec)
    try:
        # The experts load while Serve starts: on two cores that is most of the start.
        coordinator.start.remote()
        serve.start(
            proxy_location=ProxyLocation.HeadOnly if settings.ray.address is None else ProxyLocation.EveryNode,
            http_options=HTTPOptions(host=settings.server.host, port=settings.server.http_port),
            grpc_options=gRPCOptions(
                port=settings.server.grpc_port, grpc_servicer_functions=list(SERVICER_FUNCTIONS)
            ),
            logging_config=LoggingConfig(log_level="WARNING", enable_access_log=False),
        )
        with _shown_loading(coordinator, ui):
            serve.run(build_application(settings), name=APP_NAME, route_prefix="/")
        yield
    finally:
        serve.shutdown()
        for ep_rank in range(spec.topology.num_expert):
            _kill_actor(expert_actor_name(ep_rank))
        ray.kill(coordinator, no_restart=True)


def _kill_actor(name: str) -> None:
    try:
        ray.kill(ray.get_actor(name, namespace=NAMESPACE), no_restart=True)
    except ValueError:
        # It was never made: the start failed before.
        return


@contextmanager
def _shown_loading(coordinator: ray.actor.ActorHandle, ui: ServeUi) -> Iterator[None]:
    """Shows the ranks' loading progress while the block runs."""
    done = threading.Event()

    def show() -> None:
        while not done.wait(0.3):
            try:
                status: CellStatus = ray.get(coordinator.status.remote(), timeout=5.0)
            except (ray.exceptions.RayError, TimeoutError):
                continue
            for loading in status.loading:
                ui.loading(loading.name, loading.done_bytes, loading.total_bytes)

    thread = threading.Thread(target=show, name="show-loading", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(6.0)


def warm_up(settings: ShoalSettings, spec: CellSpec) -> None:
    """Sends real requests through gRPC until every expert shard has computed a row.

    Raises UnavailableError naming the shards that saw none.
    """
    shards = [ray.get_actor(expert_actor_name(i), namespace=NAMESPACE) for i in range(spec.topology.num_expert)]
    length = min(_WARM_UP_TOKENS, max(1, spec.limits.max_model_len - 1))
    with grpc.insecure_channel(f"{settings.server.host}:{settings.server.grpc_port}") as channel:
        stub = InferenceStub(channel)
        for attempt in range(_WARM_UP_TRIES):
            # Other tokens each time: a shard whose experts no token chose yet gets another chance.
            ids = [(attempt * length + index) % 251 for index in range(length)]
            request = pb.CompletionRequest(token_ids=pb.TokenIds(ids=ids), max_tokens=1, temperature=0.0)
            for _ in stub.Completion(request, timeout=_CALL_S, wait_for_ready=True):
                continue
            rows: list[int] = ray.get([shard.rows_received.remote() for shard in shards], timeout=_CALL_S)
            if all(rows):
                return
    idle = ", ".join(f"E{index}" for index, count in enumerate(rows) if count == 0)
    raise UnavailableError(f"no token reached expert shards {idle} in {_WARM_UP_TRIES} warm-up requests")


def _drain(settings: ShoalSettings) -> None:
    """Lets running requests end, at most server.drain_timeout_s; new ones are refused meanwhile."""
    handle = serve.get_app_handle(APP_NAME)
    deadline = time.monotonic() + settings.server.drain_timeout_s
    try:
        handle.drain.remote().result(timeout_s=max(0.1, deadline - time.monotonic()))
    except TimeoutError:
        return
