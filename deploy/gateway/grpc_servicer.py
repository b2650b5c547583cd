"""Registers the RPCs with Serve's gRPC proxy, so that a stream which its client leaves is always cancelled.

Serve 2.60 cancels a request when its client leaves while the proxy waits for the next message. When the client leaves
while the proxy sends one, the generators of the proxy are dropped instead, and the request runs on to its end with
nobody to read it (ray/serve/_private/proxy.py, send_request_to_replica). A fast stream hits this often.

What cancels it then runs in the proxy after the call is over, and ends with Serve's access log, which asks for the
peer; gRPC has freed that by then, and dies of the question. So the peer is asked for at the begin.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any, TypeAlias

import grpc

from deploy.gateway.inference_pb2_grpc import InferenceServicer, add_InferenceServicer_to_server

# gRPC's own types are generic in its stubs alone.
_ServicerContext: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
_MethodHandler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
_Behaviour: TypeAlias = Callable[[Any, Any], AsyncGenerator[bytes, None]]


def add_cancelling_servicer(servicer: InferenceServicer, server: grpc.aio.Server) -> None:
    """Use it for `grpc_servicer_functions`; it runs in the proxy's process, behind HAProxy in the gateway's."""
    add_InferenceServicer_to_server(servicer, _Server(server))  # type: ignore[no-untyped-call]


def cancelling(behaviour: _Behaviour) -> _Behaviour:
    """The same stream, except that one which is left at a message is cancelled as if it waited for the next."""

    async def stream(request: object, context: _ServicerContext) -> AsyncGenerator[bytes, None]:
        messages = behaviour(request, _Context(context))
        left = True
        try:
            async for message in messages:
                yield message
            left = False
        except Exception:
            left = False
            raise
        finally:
            # gRPC drops the generator of a call that ended, which closes it: GeneratorExit at the yield.
            if left:
                await _cancel(messages)

    return stream


async def _cancel(messages: AsyncGenerator[bytes, None]) -> None:
    """Has CancelledError raised where the next message is waited for; messages that are there already are dropped."""
    while True:
        following = asyncio.ensure_future(_next(messages))
        await asyncio.sleep(0)  # it must have begun to wait
        following.cancel()
        try:
            await following
        except (StopAsyncIteration, asyncio.CancelledError):
            return


async def _next(messages: AsyncGenerator[bytes, None]) -> bytes:
    return await anext(messages)


class _Context:
    """gRPC's, whose peer can be asked for when the call is over."""

    def __init__(self, context: _ServicerContext) -> None:
        self._context = context
        self._peer = context.peer()

    def peer(self) -> str:
        return self._peer

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401  # whatever gRPC gives
        return getattr(self._context, name)


class _Server:
    """What the generated function sees of the server."""

    def __init__(self, server: grpc.aio.Server) -> None:
        self._server = server

    def add_generic_rpc_handlers(self, handlers: Sequence[Any]) -> None:
        self._server.add_generic_rpc_handlers(tuple(_Handler(handler) for handler in handlers))

    def add_registered_method_handlers(self, service: str, handlers: "Mapping[str, _MethodHandler]") -> None:
        """The same handlers again, for a faster look-up; they would win over the wrapped ones."""


class _Handler(grpc.ServiceRpcHandler):  # type: ignore[type-arg]
    """Wraps what Serve put in the place of each method, when it is looked up."""

    def __init__(self, handler: Any) -> None:  # noqa: ANN401  # a private class of gRPC
        self._name: str = handler.service_name()
        # Serve replaces it under this name.
        self._method_handlers: dict[str, _MethodHandler] = handler._method_handlers

    def service_name(self) -> str:
        return self._name

    def service(self, details: grpc.HandlerCallDetails) -> "_MethodHandler | None":
        handler = self._method_handlers.get(details.method)
        if handler is None or not handler.response_streaming:
            return handler
        return _cancelling_handler(handler)


def _cancelling_handler(handler: Any) -> "_MethodHandler":  # noqa: ANN401  # the stubs do not know it as a named tuple
    wrapped: _MethodHandler = handler._replace(unary_stream=cancelling(handler.unary_stream))
    return wrapped
