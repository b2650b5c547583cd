"""Binds the deployments together."""

from ray.serve import Application

from cluster.actors.attention import AttentionDeployment
from deploy.app.gateway import GatewayDeployment
from deploy.cell_spec import build_cell_spec
from deploy.config import ShoalSettings

APP_NAME = "shoal"
# What Serve's gRPC servers serve; the functions are imported in the proxy's process, behind HAProxy in the gateway's.
SERVICER_FUNCTIONS = (
    "deploy.gateway.grpc_servicer.add_cancelling_servicer",
    "grpc_health.v1.health_pb2_grpc.add_HealthServicer_to_server",
)
# A streaming request holds its place for its whole life, and the engine queues by itself: Serve's own limit per
# replica must never be the first to bind.
_UNBOUNDED_REQUESTS = 100_000


def build_application(settings: ShoalSettings) -> Application:
    """The application for `serve.run`. Raises CheckpointError or ConfigError before anything starts."""
    spec = build_cell_spec(settings)
    named = settings.ray.attention_resource
    # A named resource is a place made for a rank: its CPU must not go to whatever else Ray puts on that node.
    place = {"num_cpus": 1} if named is None else {"num_cpus": 0, "resources": {named: 1}}
    gpus = 1 if spec.device == "cuda" else 0
    attention = AttentionDeployment.options(
        num_replicas=spec.topology.num_attention,
        max_ongoing_requests=_UNBOUNDED_REQUESTS,
        ray_actor_options={**place, "num_gpus": gpus},
        graceful_shutdown_timeout_s=settings.server.drain_timeout_s,
        graceful_shutdown_wait_loop_s=0.1,
    ).bind(spec)
    return GatewayDeployment.options(
        max_ongoing_requests=_UNBOUNDED_REQUESTS,
        graceful_shutdown_timeout_s=settings.server.drain_timeout_s,
        graceful_shutdown_wait_loop_s=0.1,
    ).bind(settings, spec.limits.max_model_len, attention)
