"""The life of one `shoal serve`."""

import logging
from contextlib import ExitStack

from cluster.logs import log_event
from deploy.app.cell_spec import build_cell_spec
from deploy.cli.progress import ServeUi
from deploy.config import ShoalSettings
from deploy.launch.application import drain_application, running_application
from deploy.launch.ray_runtime import ray_runtime
from deploy.launch.signals import StopSignals
from deploy.launch.warm_up import warm_up

logger = logging.getLogger(__name__)


def run_service(settings: ShoalSettings, ui: ServeUi) -> int:
    """Runs until a signal; returns the exit status. Raises a ShoalError when the start fails."""
    signals = StopSignals()
    host, server = settings.server.host, settings.server
    grpc_address, http_address = f"{host}:{server.grpc_port}", f"{host}:{server.http_port}"
    with ExitStack() as stack:
        stack.enter_context(signals.installed())
        try:
            with signals.interrupting():
                spec = build_cell_spec(settings)
                ui.stage("starting Ray")
                stack.enter_context(ray_runtime(settings, spec))
                # Again: Ray puts a handler of its own in place of ours.
                stack.enter_context(signals.installed())
                ui.stage("starting the cell")
                stack.enter_context(running_application(settings, spec, ui))
                ui.stage("passing a first token through every expert shard")
                warm_up(grpc_address, spec)
        except BaseException:
            # Not only StartInterrupted: raised inside Ray's compiled code it may come out as another exception.
            if not signals.raised:
                raise
            log_event(logger, "start interrupted")
            return 0
        ui.ready(grpc_address, http_address, settings.model.name)
        while not signals.wait(3600.0):
            continue
        ui.draining(0)
        if not drain_application(server.drain_timeout_s):
            log_event(logger, "requests cut short", logging.WARNING, drain_timeout_s=server.drain_timeout_s)
    return 0
