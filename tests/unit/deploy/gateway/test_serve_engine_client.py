"""What Serve raises for a request reaches the gateway as an error of the tree."""

import asyncio
from contextlib import aclosing

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
    RequestCancelledError,
)

from cluster.request import FinishReason, GenerationRequest, StepOutput
from deploy.app.gateway import ServeEngineClient
from model_shards.errors import InvalidRequestError, OverloadedError, UnavailableError
from tests.scripted_engine import on_event_loop

REQUEST = GenerationRequest("r", (1, 2), 4)


class FakeHandle:
    """A deployment handle whose stream is `outputs`, then `error`; counts how often the stream is cancelled."""

    def __init__(self, outputs=(), error=None):
        self._outputs = outputs
        self._error = error
        self.num_cancels = 0
        self.generate = self

    def options(self, stream):
        assert stream
        return self

    def remote(self, request):
        assert request is REQUEST
        return self

    def cancel(self):
        self.num_cancels += 1

    async def __aiter__(self):
        for output in self._outputs:
            yield output
        await asyncio.sleep(0)
        if self._error is not None:
            raise self._error


async def read(handle):
    async with aclosing(ServeEngineClient(handle).generate(REQUEST)) as outputs:
        return [output async for output in outputs]


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
    assert len(await read(whole)) == 2
    await read(part)
    assert (whole.num_cancels, part.num_cancels) == (0, 1)
