"""A client that leaves ends its stream wherever the proxy stands: waiting for a message, or sending one."""

import asyncio
import contextlib
from unittest import mock

import grpc
import pytest

from deploy.gateway import inference_pb2 as pb
from deploy.gateway.grpc_servicer import add_cancelling_servicer, cancelling
from deploy.gateway.inference_pb2_grpc import InferenceServicer, InferenceStub, add_InferenceServicer_to_server

BIG = pb.CompletionChunk(text="x" * 100_000)


class ProxyLike(InferenceServicer):
    """Behaves as Serve's proxy does: cancels its request only if it is cancelled while it waits for a message."""

    def __init__(self, wait_s, logs=True):
        self.wait_s = wait_s
        self.logs = logs
        self.cancelled = asyncio.Event()
        self.sent = 0

    async def Completion(self, request, context):
        try:
            while True:
                try:
                    await asyncio.sleep(self.wait_s)
                except asyncio.CancelledError:
                    self.cancelled.set()
                    raise
                self.sent += 1
                yield BIG
        except BaseException:
            if self.logs:
                self.peer = context.peer()  # for its access log, whether the call still lives or not
            yield pb.CompletionChunk(text="status")


@contextlib.asynccontextmanager
async def serving(servicer, register):
    server = grpc.aio.server()
    register(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield InferenceStub(channel)
    finally:
        await server.stop(0)


async def leave(stub, servicer):
    """Reads one message and leaves when the server sends no more: its window is full, it stands in a write."""
    call = stub.Completion(pb.CompletionRequest(text="on and on"), timeout=30.0)
    await call.read()
    sent = -1
    while servicer.sent != sent:
        sent = servicer.sent
        await asyncio.sleep(0.2)
    call.cancel()


@pytest.mark.parametrize("wait_s", [0.001, 1000.0])
def test_a_stream_that_is_left_is_cancelled(wait_s):
    async def run():
        servicer = ProxyLike(wait_s)
        async with serving(servicer, add_cancelling_servicer) as stub:
            if wait_s < 1.0:
                await leave(stub, servicer)
            else:
                call = stub.Completion(pb.CompletionRequest(text="on and on"), timeout=30.0)
                await asyncio.sleep(0.2)
                call.cancel()
            await asyncio.wait_for(servicer.cancelled.wait(), 10.0)
            await asyncio.sleep(0.1)
            assert servicer.peer.startswith("ipv4:127.0.0.1:")

    asyncio.run(run())


def test_without_it_a_stream_that_is_left_at_a_message_runs_on():
    """The reason for all this; when it fails, gRPC or Python has changed and the wrapper may be needless."""

    async def run():
        servicer = ProxyLike(0.001, logs=False)
        async with serving(servicer, add_InferenceServicer_to_server) as stub:
            await leave(stub, servicer)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(servicer.cancelled.wait(), 1.0)

    asyncio.run(run())


def test_a_stream_that_ends_by_itself_is_not_cancelled_and_an_error_passes():
    async def run():
        ended = []

        async def three(request, context):
            for number in range(3):
                yield number
            ended.append("ran out")

        async def fails(request, context):
            yield 0
            raise ValueError("no more")

        context = mock.create_autospec(grpc.aio.ServicerContext)
        assert [item async for item in cancelling(three)(None, context)] == [0, 1, 2]
        assert ended == ["ran out"]
        with pytest.raises(ValueError, match="no more"):
            async for _ in cancelling(fails)(None, context):
                pass

    asyncio.run(run())


def test_messages_that_wait_already_are_dropped_until_the_stream_waits():
    async def run():
        cancelled = []

        async def eager(request, context):
            for number in range(5):
                yield number  # without waiting in between
            try:
                await asyncio.sleep(1000.0)
            except asyncio.CancelledError:
                cancelled.append(True)
                raise
            yield 5

        stream = cancelling(eager)(None, mock.create_autospec(grpc.aio.ServicerContext))
        assert await anext(stream) == 0
        await stream.aclose()
        assert cancelled == [True]

    asyncio.run(run())
