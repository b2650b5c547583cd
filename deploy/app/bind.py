"""Makes Serve's gRPC proxy listen on the configured host.

Serve 2.60 binds its gRPC proxy to every interface and has no setting for it, while its HTTP proxy has one. A model
server that listens where nobody asked it to is a hole, so Shoal uses the two hooks Serve offers: the callback that
each proxy process calls at its start (RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH), and `default_impl`, the module
Serve keeps for implementations that are to be replaced.
"""

import os
from collections.abc import Mapping
from typing import Protocol

import ray.serve._private.default_impl as serve_default_impl

CALLBACK_PATH = "deploy.app.bind:bind_grpc_proxy"
_CALLBACK_VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
_HOST_VARIABLE = "SHOAL_GRPC_BIND_HOST"


def proxy_environment(host: str) -> Mapping[str, str]:
    """The variables that Ray's processes need so that the gRPC proxy binds `host`."""
    return {_CALLBACK_VARIABLE: CALLBACK_PATH, _HOST_VARIABLE: host}


class _Server(Protocol):
    """The part of grpc.aio.Server used below."""

    def add_insecure_port(self, address: str) -> int: ...


def bind_grpc_proxy() -> list[object]:
    """Called by Serve in each proxy process before its servers start; adds no HTTP middleware."""
    host = os.environ[_HOST_VARIABLE]

    def add_grpc_address(server: _Server, address: str) -> None:
        port = address.rpartition(":")[2]
        bracketed = f"[{host}]" if ":" in host else host
        server.add_insecure_port(f"{bracketed}:{port}")

    serve_default_impl.add_grpc_address = add_grpc_address
    return []
