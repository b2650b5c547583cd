"""What Serve raises for a request reaches the gateway as an error of the tree."""

import asyncio
from contextlib import aclosing, asynccontextmanager

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
    RequestCancelledError,
)

from cluster.link import receiver
from cluster.link.receiver import OutputLink
from cluster.request import FinishReason, GenerationRequest, StepOutput
from deploy.app.gateway import ServeEngineClient
from model_shards.errors import InvalidRequestError, OverloadedError, UnavailableError
from tests.scripted_engine import on_event_loop

REQUEST = GenerationRequest("r", (1, 2), 4)


class FakeHandle:
    """A deployment handle: `outputs` reach the stream over the link, then the call ends with `error` or well."""

    def __init__(self, outputs=(), error=None):
        self._outputs = outputs
        self._error = error
        self.num_cancels = 0
        self.cancelled = asyncio.Event()
        self.run = self
        self.by_reference = True  # as Serve's own handle is made in `shoal serve`

    def connect(self, link):
        self._link = link

    def options(self, *, _by_reference):
        self.by_reference = _by_reference
        return self

    def remote(self, request, address):
        assert request is REQUEST
        assert not self.by_reference, "a call through Ray's actors: slower than Serve's gRPC"
        self._stream = self._link._streams[address.stream]
        return self

    def cancel(self):
        self.num_cancels += 1
        self.cancelled.set()

    def __await__(self):
        return self._carry_out().__await__()

    async def _carry_out(self):
        for output in self._outputs:
            self._stream.put(output)
            await asyncio.sleep(0.01)
        if self._error is not None:
            raise self._error
        if not self._outputs or self._outputs[-1].finish_reason is None:
            await self.cancelled.wait()
            raise RequestCancelledError("r")


@asynccontextmanager
async def client_of(handle):
    link = await OutputLink.open("127.0.0.1")
    handle.connect(link)
    client = ServeEngineClient(handle, link)
    try:
        yield client
        while client._calls:
            await asyncio.wait(client._calls)
    finally:
        await link.close()


async def read(handle, count=None):
    async with client_of(handle) as client, aclosing(client.generate(REQUEST)) as outputs:
        if count is None:
            return [output async for output in outputs]
        return [await anext(outputs) for _ in range(count)]


UNAVAILABLE = DeploymentUnavailableError(DeploymentID("attention", "shoal"))


@pytest.mark.parametrize("outputs", [(), (StepOutput("r", (3,)),)], ids=["at once", "midway"])
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ActorDiedError(), "was lost; send it again"),
        (ActorUnavailableError("away", b"0" * 16), "was lost; send it again"),
        (UNAVAILABLE, "no attention replica is available"),
        (ReplicaUnavailableError("r1"), "no attention replica is available"),
        (RayTaskError("generate", "Traceback", UNAVAILABLE).as_instanceof_cause(), "no attention replica is available"),
    ],
)
@on_event_loop
async def test_a_replica_that_is_lost_or_not_there_is_unavailable(outputs, error, message):
    handle = FakeHandle(outputs, error)
    with pytest.raises(UnavailableError, match=message) as failure:
        await read(handle)
    assert failure.value.__cause__ is error
    assert handle.num_cancels == 1


@pytest.mark.parametrize(("told", "delay"), [(None, 1.0), (7.5, 7.5)])
@on_event_loop
async def test_a_full_queue_of_serve_is_overload_with_serves_delay(told, delay):
    with pytest.raises(OverloadedError) as failure:
        await read(FakeHandle(error=BackPressureError(5, 5, retry_after_s=told)))
    assert failure.value.retry_after_s == delay


@pytest.mark.parametrize("error", [InvalidRequestError("too long"), RequestCancelledError("r"), ValueError("bug")])
@on_event_loop
async def test_every_other_error_comes_through_as_it_is(error):
    with pytest.raises(type(error)) as failure:
        await read(FakeHandle(error=error))
    assert failure.value is error


@on_event_loop
async def test_a_stream_is_cancelled_unless_it_ended():
    last = StepOutput("r", (4,), FinishReason.LENGTH)
    whole, part = FakeHandle([StepOutput("r", (3,)), last]), FakeHandle([StepOutput("r", (3,))])
    assert [output.token_ids for output in await read(whole)] == [(3,), (4,)]
    assert [output.token_ids for output in await read(part, 1)] == [(3,)]
    assert (whole.num_cancels, part.num_cancels) == (0, 1)


@on_event_loop
async def test_a_call_that_serve_cancels_is_unavailable():
    handle = FakeHandle()
    handle.cancelled.set()
    handle._error = asyncio.CancelledError()
    with pytest.raises(UnavailableError, match="its call was cancelled"):
        await read(handle)


@on_event_loop
async def test_a_call_that_ends_well_without_a_last_output_is_unavailable(monkeypatch):
    monkeypatch.setattr(receiver, "LAST_OUTPUT_S", 0.05)
    handle = FakeHandle([StepOutput("r", (3,))])

    async def nothing():
        return None

    handle._carry_out = nothing
    with pytest.raises(UnavailableError, match="its last output was lost"):
        await read(handle)
    assert handle.num_cancels == 1
