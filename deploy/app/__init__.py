"""The Ray Serve application: gateway -> attention replicas -> expert shards.

`deploy.app:build` is the import path that a RayService's serveConfigV2 names.
"""

from pathlib import Path

from ray.serve import Application

from deploy.app.application import APP_NAME, SERVICER_FUNCTIONS, build_application
from deploy.config import ShoalConfig

__all__ = ["APP_NAME", "SERVICER_FUNCTIONS", "build", "build_application"]


def build(args: dict[str, str]) -> Application:
    """Builds the application from `{"config": "/path/to/shoal.yaml"}`; Serve calls this on the cluster."""
    return build_application(ShoalConfig.load(Path(args["config"]), {}))
