"""The replica's side of the link: sends the outputs of each gateway's streams, one message per gateway and step."""

import asyncio
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol, cast

from google.protobuf.message import EncodeError

from cluster.link.sockets import bound_silence
from cluster.link.wire import LinkAddress, StreamAddress, batch_frame, hello_frame
from cluster.logs import log_event
from cluster.outputs import OnOutput, join_outputs
from cluster.request import GenerationRequest, StepOutput
from model_shards.errors import ShoalError, UnavailableError

logger = logging.getLogger(__name__)

_CONNECT_S = 5.0


class StreamSource(Protocol):
    """An AttentionReplica."""

    def open_stream(self, request: GenerationRequest, on_output: OnOutput) -> AbstractContextManager[None]:
        """Runs the request inside the block. See AttentionReplica.open_stream."""
        ...


class OutputHub:
    """Lives on the event loop of its replica. A gateway that does not read holds up nobody else's streams."""

    def __init__(self, source: StreamSource) -> None:
        self._source = source
        self._gateways: dict[LinkAddress, _Gateway] = {}

    async def run(self, request: GenerationRequest, destination: StreamAddress) -> None:
        """Returns when the connection has taken the request's last output; being cancelled cancels the request.

        Raises what the replica raises for the request, and UnavailableError when the connection to the gateway is lost,
        or when the stream runs here already: whoever routes may ask again where the first time was not answered.
        """
        gateway = self._gateways.get(destination.link)
        if gateway is None:
            gateway = self._gateways[destination.link] = _Gateway(destination.link, self._forget)
        end = gateway.add(destination.stream)
        try:
            with self._source.open_stream(request, lambda output: gateway.push(destination.stream, output)):
                await end
        finally:
            gateway.remove(destination.stream)

    def close(self) -> None:
        """Closes the connections; what still runs over them ends with UnavailableError."""
        for gateway in list(self._gateways.values()):
            gateway.close()

    def _forget(self, gateway: "_Gateway") -> None:
        if self._gateways.get(gateway.address) is gateway:
            del self._gateways[gateway.address]


class _Gateway(asyncio.Protocol):
    """The connection to one gateway; it is kept until it breaks, and its streams end with it.

    Outputs wait here, joined, until the connection stands and takes more. A callback that pushes the outputs of one
    step makes one message of them: it is sent when the callback is over.
    """

    def __init__(self, address: LinkAddress, on_lost: Callable[["_Gateway"], None]) -> None:
        self.address = address
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._ends: dict[int, asyncio.Future[None]] = {}
        self._waiting: dict[int, list[StepOutput]] = {}
        self._transport: asyncio.Transport | None = None
        self._takes_more = False
        self._will_send = False
        self._connecting = self._loop.create_task(self._connect())

    def add(self, stream: int) -> "asyncio.Future[None]":
        """A stream begins; the future is done when its last output was sent, or fails with what ended it.

        Raises UnavailableError for a stream that has begun. The gateway learns at once which connection feeds it.
        """
        if stream in self._ends:
            raise UnavailableError("this request runs already; send it again")
        end = self._ends[stream] = self._loop.create_future()
        self._put(stream, StepOutput("", ()))
        return end

    def remove(self, stream: int) -> None:
        """Nothing more of this stream is sent."""
        del self._ends[stream]
        self._waiting.pop(stream, None)

    def push(self, stream: int, output: StepOutput | ShoalError) -> None:
        """Takes an output of a stream that runs."""
        if isinstance(output, ShoalError):
            _fail(self._ends[stream], output)
            return
        self._put(stream, output)

    def _put(self, stream: int, output: StepOutput) -> None:
        self._waiting.setdefault(stream, []).append(output)
        if self._takes_more and not self._will_send:
            self._will_send = True
            self._loop.call_soon(self._send)

    def close(self) -> None:
        """Ends the connection when it has sent what it took, or the try to make one."""
        self._connecting.cancel()
        if self._transport is not None:
            self._transport.close()

    # --- called by asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        bound_silence(transport)
        # Not asserted: uvloop's, which Ray uses, is a transport without being one of asyncio's class.
        self._transport = cast(asyncio.Transport, transport)
        self._takes_more = True
        self._transport.write(hello_frame(self.address.token))
        self._send()

    def pause_writing(self) -> None:
        self._takes_more = False

    def resume_writing(self) -> None:
        self._takes_more = True
        self._send()

    def connection_lost(self, error: Exception | None) -> None:
        self._lose("closed by the gateway" if error is None else str(error))

    # ---

    async def _connect(self) -> None:
        address = self.address
        try:
            async with asyncio.timeout(_CONNECT_S):
                await self._loop.create_connection(lambda: self, address.host, address.port)
        except TimeoutError:
            self._lose(f"not open within {_CONNECT_S:g} s")
        except OSError as error:
            self._lose(str(error))
        except asyncio.CancelledError:
            self._lose("closed while it was opened")
            raise

    def _send(self) -> None:
        self._will_send = False
        if not self._waiting or not self._takes_more or self._transport is None:
            return
        outputs = {stream: join_outputs(waiting) for stream, waiting in self._waiting.items()}
        self._waiting = {}
        try:
            self._transport.write(batch_frame(outputs.items()))
        except (TypeError, ValueError, EncodeError):
            # What protobuf cannot hold: a fault of ours. Better that these streams end than that they wait for ever.
            logger.exception("outputs cannot be sent")
            self._transport.abort()
            return
        for stream, output in outputs.items():
            end = self._ends.get(stream)
            if end is not None and output.finish_reason is not None and not end.done():
                end.set_result(None)

    def _lose(self, reason: str) -> None:
        self._takes_more = False
        self._on_lost(self)
        gateway = f"{self.address.host}:{self.address.port}"
        log_event(logger, "link lost", logging.WARNING, gateway=gateway, reason=reason, num_streams=len(self._ends))
        for end in self._ends.values():
            # An exception of its own for each: raised, it holds the frames of whoever it was raised to.
            _fail(end, UnavailableError(f"the link to the gateway at {gateway} was lost ({reason}); send it again"))


def _fail(end: "asyncio.Future[None]", error: ShoalError) -> None:
    if not end.done():
        end.set_exception(error)
