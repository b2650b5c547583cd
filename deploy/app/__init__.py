"""The Ray Serve application: gateway -> attention replicas -> expert shards.

`deploy.app:build` is the import path that a RayService's serveConfigV2 names. Serve's proxies and the gateway import
this package too, each in a process of its own, and have no use for torch: it is imported by what needs it alone.
"""

from pathlib import Path

from ray.serve import Application

from deploy.config import ShoalConfig

__all__ = ["build"]


def build(args: dict[str, str]) -> Application:
    """Builds the application from `{"config": "/path/to/shoal.yaml"}`; Serve calls this on the cluster."""
    from deploy.app.application import build_application

    return build_application(ShoalConfig.load(Path(args["config"]), {}))
