"""The life of one `shoal serve`."""

import logging
import os
from contextlib import ExitStack

from cluster.logs import log_event
from deploy.cell_spec import build_cell_spec
from deploy.cli.progress import ServeUi
from deploy.config import ShoalSettings
from deploy.launch.application import drain_application, running_application
from deploy.launch.haproxy import front
from deploy.launch.ray_runtime import RayRuntime, ray_runtime
from deploy.launch.signals import StopSignals, kill_children
from deploy.launch.warm_up import warm_up

logger = logging.getLogger(__name__)

_WATCH_S = 5.0


def run_service(settings: ShoalSettings, ui: ServeUi, signals: StopSignals) -> None:
    """Runs until one of `signals`, which the caller has installed.

    Raises StartInterrupted for a signal before the service was ready, a ShoalError when the start fails; nothing is
    left running then.
    """
    server = settings.server
    grpc_address, http_address = (
        join_address(server.host, server.grpc_port),
        join_address(server.host, server.http_port),
    )
    with ExitStack() as stack:
        with signals.interrupting():
            spec = build_cell_spec(settings)
            ui.stage("starting Ray")
            before = stack.enter_context(front(settings))
            runtime = stack.enter_context(ray_runtime(settings, before.environment, spec, signals))
            ui.stage("starting the cell")
            stack.enter_context(running_application(settings, before.serve_host, spec, ui))
            ui.stage("passing a first token through every expert shard")
            warm_up(grpc_address, spec)
        ui.ready(grpc_address, http_address, settings.model.name)
        _watch(runtime, signals)
        ui.draining()
        if not drain_application(server.drain_timeout_s):
            log_event(logger, "requests cut short", logging.WARNING, drain_timeout_s=server.drain_timeout_s)


def join_address(host: str, port: int) -> str:
    """HOST:PORT; an IPv6 host in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _watch(runtime: RayRuntime, signals: StopSignals) -> None:
    """Returns at the first signal. Serve and the coordinator replace what is lost; without Ray there is neither."""
    while not signals.wait(_WATCH_S):
        lost = runtime.lost()
        if lost is not None:
            log_event(logger, "Ray ended, and with it the service; start it again", logging.ERROR, lost=lost)
            # Everything that would be stopped in order needs Ray for it.
            kill_children()
            os._exit(1)
