"""Serve's gRPC servers listen where they were told to, and a gateway's alone."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from ray.serve._private import default_impl

from deploy.app.bind import GATEWAY_GRPC_PORTS, bind_grpc_proxy, proxy_environment
from deploy.preflight import free_ports


@pytest.fixture
def server() -> Iterator[grpc.Server]:
    # As Serve makes it: gRPC does not take this for "no", and lets others listen on the port too.
    made = grpc.server(ThreadPoolExecutor(1), options=[("grpc.so_reuseport", "0")])
    yield made
    made.stop(None)


def bound(monkeypatch: pytest.MonkeyPatch, server: grpc.Server, port: int, gateways: tuple[int, int]) -> None:
    monkeypatch.setattr(default_impl, "add_grpc_address", default_impl.add_grpc_address)  # put back afterwards
    for name, value in proxy_environment("127.0.0.1").items():
        monkeypatch.setenv(name, value)
    for name, number in zip(GATEWAY_GRPC_PORTS, gateways, strict=True):
        monkeypatch.setenv(name, str(number))
    assert bind_grpc_proxy() == []
    default_impl.add_grpc_address(server, f"[::]:{port}")
    server.start()


def other(monkeypatch: pytest.MonkeyPatch, port: int, gateways: tuple[int, int]) -> None:
    second = grpc.server(ThreadPoolExecutor(1), options=[("grpc.so_reuseport", "0")])
    try:
        bound(monkeypatch, second, port, gateways)
    finally:
        second.stop(None)


def test_two_gateways_never_share_a_port(monkeypatch: pytest.MonkeyPatch, server: grpc.Server) -> None:
    (port,) = free_ports("127.0.0.1", 1)
    bound(monkeypatch, server, port, (port, port + 1))
    with pytest.raises(RuntimeError, match=f"port {port} on 127.0.0.1 cannot be taken: Address already in use"):
        other(monkeypatch, port, (port, port + 1))


def test_a_proxy_may_start_before_the_one_that_it_replaces_has_ended(
    monkeypatch: pytest.MonkeyPatch, server: grpc.Server
) -> None:
    (port,) = free_ports("127.0.0.1", 1)
    bound(monkeypatch, server, port, (port + 1, port + 2))
    other(monkeypatch, port, (port + 1, port + 2))
