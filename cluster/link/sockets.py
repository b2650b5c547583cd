"""Makes a connection whose other machine is gone break in bounded time, used or idle."""

import asyncio
import socket

LOST_AFTER_S = 15
_PROBE_S = 5


def bound_silence(transport: asyncio.BaseTransport) -> None:
    """After `LOST_AFTER_S` in which the other side acknowledged nothing the connection is lost; on Linux alone.

    Also when the other machine answers, but its process takes nothing and its buffers are full.
    """
    connection = transport.get_extra_info("socket")
    if connection is None or not hasattr(socket, "TCP_USER_TIMEOUT"):
        return
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _PROBE_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _PROBE_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, LOST_AFTER_S // _PROBE_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, LOST_AFTER_S * 1000)
