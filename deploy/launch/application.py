"""The cell and its Serve application inside a `with`: started, watched until it runs, taken down at the end."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeAlias

import ray
from ray import serve
from ray.serve.config import HTTPOptions, ProxyLocation, gRPCOptions
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview, LoggingConfig

from cluster.actors.coordinator import get_or_create_coordinator, remove_cell
from cluster.control import CellStatus
from cluster.logs import log_event
from cluster.spec import CellSpec
from deploy.app.application import APP_NAME, SERVICER_FUNCTIONS, build_application
from deploy.cli.progress import ServeUi
from deploy.config import ShoalSettings
from model_shards.errors import CheckpointError, ShoalError, UnavailableError

logger = logging.getLogger(__name__)

_Actor: TypeAlias = ray.actor.ActorHandle
# Beside the bounds of loading and joining: Serve's controller, proxies and worker processes.
_SERVE_START_S = 60.0
_POLL_S = 0.25  # Serve and the coordinator work for each answer, while the ranks start on the same cores
_CALL_S = 15.0
# How Serve tells this error of an attention replica.
_DAMAGED = f"{CheckpointError.__module__}.{CheckpointError.__name__}: "


@contextmanager
def running_application(settings: ShoalSettings, serve_host: str, spec: CellSpec, ui: ServeUi) -> Iterator[None]:
    """The application runs inside the block, Serve's own servers on `serve_host`; its actors are gone after it.

    Raises UnavailableError, naming the missing ranks and the last error, when it does not run in time, and
    CheckpointError as soon as a rank finds its files damaged.
    """
    coordinator = get_or_create_coordinator(spec)
    try:
        # The experts load while Serve starts: on two cores that is most of the start.
        coordinator.start.remote()
        deadline = time.monotonic() + spec.load_timeout_s + spec.join_timeout_s + _SERVE_START_S
        serve.start(
            proxy_location=ProxyLocation.HeadOnly if settings.ray.address is None else ProxyLocation.EveryNode,
            http_options=HTTPOptions(host=serve_host, port=settings.server.http_port),
            grpc_options=gRPCOptions(port=settings.server.grpc_port, grpc_servicer_functions=list(SERVICER_FUNCTIONS)),
            logging_config=LoggingConfig(log_level="WARNING", enable_access_log=False),
        )
        target = serve.RunTarget(build_application(settings), name=APP_NAME, route_prefix="/")
        serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
        _wait_until_running(coordinator, deadline, ui)
        yield
    finally:
        serve.shutdown()
        remove_cell(spec)


def drain_application(timeout_s: float) -> bool:
    """Refuses new requests and lets the running ones end; whether they did in time."""
    try:
        handle = serve.get_app_handle(APP_NAME)
        # There is no event loop here that the router could run on, as it does in the gateway (SERVE_ENVIRONMENT), which
        # this process may have been started with.
        handle._init(_run_router_in_separate_loop=True)
        handle.drain.remote().result(timeout_s=timeout_s)
    except (TimeoutError, ray.exceptions.RayError, RayServeException) as error:
        log_event(logger, "not drained", logging.WARNING, error=f"{type(error).__name__}: {error}")
        return False
    return True


def _wait_until_running(coordinator: _Actor, deadline: float, ui: ServeUi) -> None:
    under_way: dict[str, int] = {}
    while True:
        application = serve.status().applications.get(APP_NAME)
        status = _cell_status(coordinator)
        if status is not None:
            under_way = _show_loading(under_way, status, ui)
            if status.damage:
                # The shard would try again for ever, for somebody may mend them; here nobody has begun to use it.
                raise CheckpointError("\n".join(dict.fromkeys(status.damage)))
        if application is not None and application.status is ApplicationStatus.RUNNING:
            return
        failed = application is not None and application.status is ApplicationStatus.DEPLOY_FAILED
        if failed or time.monotonic() > deadline:
            raise _why_not_running(failed, application, status)
        time.sleep(_POLL_S)


def _show_loading(under_way: dict[str, int], status: CellStatus, ui: ServeUi) -> dict[str, int]:
    """Shows who loads; returns the bytes that each of them has to read. Who was among them and is not has read all."""
    loading = {rank.name: rank.total_bytes for rank in status.loading}
    for name, total_bytes in under_way.items():
        if name not in loading:
            ui.loading(name, total_bytes, total_bytes)
    for rank in status.loading:
        ui.loading(rank.name, rank.done_bytes, rank.total_bytes)
    return loading


def _cell_status(coordinator: _Actor) -> CellStatus | None:
    """None when it does not answer: it may be restarting, and Serve's status says more then."""
    try:
        status: CellStatus = ray.get(coordinator.status.remote(), timeout=_CALL_S)
    except (ray.exceptions.RayError, TimeoutError):
        return None
    return status


def _why_not_running(
    failed: bool, application: ApplicationStatusOverview | None, status: CellStatus | None
) -> ShoalError:
    late = "the cell did not start in time (cell.load_timeout_s, cell.join_timeout_s)"
    said = ["the cell failed to start" if failed else late]
    if status is None:
        said.append("its coordinator does not answer")
    else:
        said.append(f"missing ranks: {', '.join(status.missing) or 'none'}")
        said.append(f"last error: {status.last_error or 'none'}")
    for name, deployment in {} if application is None else application.deployments.items():
        cause = _last_line(deployment.message)
        if cause.startswith(_DAMAGED):
            return CheckpointError(cause.removeprefix(_DAMAGED))
        if cause:
            said.append(f"{name}: {cause}")
    return UnavailableError("; ".join(said))


def _last_line(message: str) -> str:
    """The exception at the end of a traceback; the rest of it is in the log."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return lines[-1] if lines else ""
