"""Makes Serve's gRPC servers listen on the configured host, and alone on their port.

Serve 2.60 binds them to every interface and has no setting for it, while its HTTP servers have one. A model server that
listens where nobody asked it to is a hole, so Shoal uses the two hooks Serve offers: the callback that each proxy, and
each gateway behind HAProxy, calls at its start (RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH), and `default_impl`, the
module Serve keeps for implementations that are to be replaced.

A gateway's server takes the first free port of a range. Serve means it to be free for no other server, but hands gRPC
the option in a form that gRPC does not know, so that two services could share one port, and each other's requests.
"""

import os
import socket
from collections.abc import Mapping
from typing import Protocol

import ray.serve._private.default_impl as serve_default_impl

CALLBACK_PATH = "deploy.app.bind:bind_grpc_proxy"
_CALLBACK_VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
_HOST_VARIABLE = "SHOAL_GRPC_BIND_HOST"
# The first port of Serve's range for gateways' gRPC servers, and the one behind the last.
GATEWAY_GRPC_PORTS = ("RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT", "RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT")


def proxy_environment(host: str) -> Mapping[str, str]:
    """The variables that Ray's processes need so that the gRPC proxy binds `host`."""
    return {_CALLBACK_VARIABLE: CALLBACK_PATH, _HOST_VARIABLE: host}


class _Server(Protocol):
    """The part of grpc.aio.Server used below."""

    def add_insecure_port(self, address: str) -> int: ...


def bind_grpc_proxy() -> list[object]:
    """Called by Serve in each process with servers before they start; adds no HTTP middleware."""
    host = os.environ[_HOST_VARIABLE]
    gateways = range(*(int(os.environ.get(name, 0)) for name in GATEWAY_GRPC_PORTS))

    def add_grpc_address(server: _Server, address: str) -> None:
        port = int(address.rpartition(":")[2])
        if port in gateways:
            _check_unused(host, port)
        bracketed = f"[{host}]" if ":" in host else host
        server.add_insecure_port(f"{bracketed}:{port}")

    serve_default_impl.add_grpc_address = add_grpc_address
    return []


def _check_unused(host: str, port: int) -> None:
    """Raises RuntimeError, at which Serve tries the next port, when somebody listens there."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as listener:
            # Connections of a former server that linger in TIME_WAIT do not hold the port.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(1)
    except OSError as error:
        raise RuntimeError(f"port {port} on {host} cannot be taken: {error.strerror}") from error
