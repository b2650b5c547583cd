"""The gateway's side of the link: takes the messages of all replicas and deals them to the streams of its requests."""

import asyncio
import hmac
import itertools
import logging
import secrets
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Self, cast

from google.protobuf.message import DecodeError

from cluster.link import link_pb2 as pb
from cluster.link.pace import chunk_interval_s
from cluster.link.sockets import bound_silence
from cluster.link.wire import FrameReader, LinkAddress, ProtocolError, StreamAddress, output_of
from cluster.logs import log_event
from cluster.outputs import OutputQueue, next_output
from cluster.request import StepOutput
from model_shards.errors import UnavailableError

logger = logging.getLogger(__name__)

LAST_OUTPUT_S = 5.0  # the last output may be this much behind the end of the call
_HELLO_S = 5.0
_MAX_HELLO_BYTES = 1024
_MAX_BATCH_BYTES = 2**31 - 1  # protobuf's own


class OutputLink:
    """Listens until it is closed. Build it with `open`; lives on one event loop."""

    def __init__(self, host: str) -> None:
        self._host = host
        self._token = secrets.token_hex(32)
        self._numbers = itertools.count(1)
        self._streams: dict[int, OutputStream] = {}
        self._replicas: set[_Replica] = set()
        self._server: asyncio.Server | None = None

    @classmethod
    async def open(cls, host: str) -> Self:
        """Listens on a free port of `host`, and on no other interface. Raises OSError when it cannot."""
        link = cls(host)
        link._server = await asyncio.get_running_loop().create_server(lambda: _Replica(link), host, 0)
        return link

    @property
    def address(self) -> LinkAddress:
        """What a replica needs to send outputs here."""
        assert self._server is not None, "OutputLink.open builds it"
        return LinkAddress(self._host, int(self._server.sockets[0].getsockname()[1]), self._token)

    @contextmanager
    def open_stream(self, request_id: str) -> Iterator["OutputStream"]:
        """A stream that outputs reach while the block runs; later ones are dropped."""
        number = next(self._numbers)
        stream = self._streams[number] = OutputStream(request_id, StreamAddress(self.address, number), self._interval_s)
        try:
            yield stream
        finally:
            del self._streams[number]

    async def close(self) -> None:
        """Stops listening and closes every connection; the replicas then fail what still runs over them."""
        assert self._server is not None
        self._server.close()
        for replica in list(self._replicas):
            replica.abort()
        await self._server.wait_closed()

    def _interval_s(self) -> float:
        return chunk_interval_s(len(self._streams))

    # --- called by connections

    def admits(self, hello: pb.Hello) -> bool:
        """Whether the sender was told the way here by this gateway."""
        return hmac.compare_digest(hello.token.encode(), self._token.encode())

    def connected(self, replica: "_Replica") -> None:
        """Keeps the connection for `close`."""
        self._replicas.add(replica)

    def disconnected(self, replica: "_Replica") -> None:
        """A replica that lives notices too, and ends the calls whose outputs it cannot send, with a better reason."""
        self._replicas.discard(replica)
        for stream in self._streams.values():
            stream.lost(replica)

    def deal(self, replica: "_Replica", batch: pb.OutputBatch) -> None:
        """Gives each output to its stream; a stream that is closed has none."""
        for wire in batch.outputs:
            stream = self._streams.get(wire.stream)
            if stream is not None:
                stream.take(replica, output_of(wire, stream.request_id))


class OutputStream:
    """The outputs of one request. They come over the link; how the request ended, the call that started it tells."""

    def __init__(self, request_id: str, address: StreamAddress, interval_s: Callable[[], float]) -> None:
        """`interval_s` tells how long outputs gather after one was read."""
        self.request_id = request_id
        self.address = address
        self._interval_s = interval_s
        self._queue: OutputQueue = asyncio.Queue()
        self._has_end = asyncio.Event()  # nothing comes behind what is in the queue
        self._replica: _Replica | None = None  # whose connection feeds it
        self._late: asyncio.TimerHandle | None = None

    def put(self, output: StepOutput | Exception) -> None:
        """An output has come, or an error ends the stream."""
        self._queue.put_nowait(output)
        if isinstance(output, Exception) or output.finish_reason is not None:
            self._has_end.set()

    def take(self, replica: "_Replica", output: StepOutput) -> None:
        """An output has come over this connection; the first one is empty and tells only which connection it is.

        From a second one the stream would get tokens twice: it fails.
        """
        if self._replica is None:
            self._replica = replica
        elif self._replica is not replica:
            self._fail("it ran on two replicas")
            return
        if output.token_ids or output.finish_reason is not None:
            self.put(output)

    def lost(self, replica: "_Replica") -> None:
        """This connection is gone; if it fed the stream, the call has `LAST_OUTPUT_S` to say why."""
        if self._replica is replica and not self._has_end.is_set():
            self._fail_later("the connection from its replica was lost")

    async def outputs(self, call: "asyncio.Future[None]") -> AsyncGenerator[StepOutput, None]:
        """Outputs up to the one with a finish reason; those that gathered meanwhile come as one.

        `call` ends well when the replica has sent the last output. Raises what the call raises before that output has
        come, and UnavailableError when the call was cancelled, or the last output is `LAST_OUTPUT_S` behind its end or
        behind the end of the connection that it was to come over.
        """
        with self._watching(call):
            ended = False
            while not ended:
                # No deadline here: whatever becomes of the replica, its call or the link ends (cluster.link.sockets).
                output = await next_output(self._queue)
                ended = output.finish_reason is not None
                gathered = asyncio.get_running_loop().time() + self._interval_s()
                yield output
                await self._gather(gathered)

    async def _gather(self, until: float) -> None:
        """Lets outputs wait for each other up to this time of the event loop, or to the end of the request."""
        if not self._has_end.is_set() and until > asyncio.get_running_loop().time():
            with suppress(TimeoutError):
                async with asyncio.timeout_at(until):
                    await self._has_end.wait()

    @contextmanager
    def _watching(self, call: "asyncio.Future[None]") -> Iterator[None]:
        def call_ended(call: "asyncio.Future[None]") -> None:
            if call.cancelled():
                self._fail("its call was cancelled")
            elif (error := call.exception()) is None:
                self._fail_later("its last output was lost")
            elif isinstance(error, Exception):
                self.put(error)
            else:
                self._fail(f"its call ended with {type(error).__name__}")

        call.add_done_callback(call_ended)
        try:
            yield
        finally:
            call.remove_done_callback(call_ended)
            if self._late is not None:
                self._late.cancel()

    def _fail_later(self, reason: str) -> None:
        if self._late is None:
            self._late = asyncio.get_running_loop().call_later(LAST_OUTPUT_S, self._fail, reason)

    def _fail(self, reason: str) -> None:
        self.put(UnavailableError(f"request {self.request_id} failed: {reason}; send it again"))


class _Replica(asyncio.Protocol):
    """The connection that one replica made. Reads all the time: what comes waits in its stream, never here."""

    def __init__(self, link: OutputLink) -> None:
        self._link = link
        self._frames = FrameReader(_MAX_HELLO_BYTES)
        self._admitted = False
        self._transport: asyncio.Transport | None = None
        self._late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        bound_silence(transport)
        # Not asserted: uvloop's, which Ray uses, is a transport without being one of asyncio's class.
        self._transport = cast(asyncio.Transport, transport)
        self._link.connected(self)
        self._late = asyncio.get_running_loop().call_later(_HELLO_S, self._refuse, f"no hello within {_HELLO_S:g} s")

    def data_received(self, data: bytes) -> None:
        try:
            for payload in self._frames.feed(data):
                self._take(payload)
        except (ProtocolError, DecodeError, ValueError) as error:
            self._refuse(str(error))

    def connection_lost(self, error: Exception | None) -> None:
        if self._late is not None:
            self._late.cancel()
        self._link.disconnected(self)

    def abort(self) -> None:
        """Closes the connection at once."""
        if self._transport is not None:
            self._transport.abort()

    def _take(self, payload: bytes) -> None:
        if self._admitted:
            self._link.deal(self, pb.OutputBatch.FromString(payload))
            return
        if not self._link.admits(pb.Hello.FromString(payload)):
            raise ProtocolError("the token is wrong")
        self._admitted = True
        self._frames.max_frame_bytes = _MAX_BATCH_BYTES
        if self._late is not None:
            self._late.cancel()

    def _refuse(self, reason: str) -> None:
        peer = None if self._transport is None else self._transport.get_extra_info("peername")
        log_event(logger, "connection refused", logging.WARNING, peer=str(peer), reason=reason)
        self.abort()
