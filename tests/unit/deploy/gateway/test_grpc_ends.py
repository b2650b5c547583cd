"""However a gRPC call ends early, the engine's stream is closed."""

import grpc
import pytest

from deploy.gateway import inference_pb2 as pb
from deploy.gateway.inference_pb2_grpc import InferenceStub
from tests.scripted_engine import ScriptedEngine, grpc_channel, make_gateway, on_event_loop


@on_event_loop
async def test_a_cancelled_call_closes_the_engines_stream():
    engine = ScriptedEngine(holds=True)
    gateway = make_gateway(engine)
    async with grpc_channel(gateway) as channel:
        call = InferenceStub(channel).Completion(pb.CompletionRequest(text="Hello"))
        await call.read()
        assert engine.num_open == 1
        call.cancel()
        await engine.closed.wait()
    assert (engine.num_open, gateway.num_running) == (0, 0)


@on_event_loop
async def test_the_deadline_of_the_client_closes_the_engines_stream():
    engine = ScriptedEngine(holds=True)
    gateway = make_gateway(engine)
    async with grpc_channel(gateway) as channel:
        call = InferenceStub(channel).Completion(pb.CompletionRequest(text="Hello"), timeout=0.3)
        with pytest.raises(grpc.RpcError) as failure:
            [chunk async for chunk in call]
        await gateway.drain()
    assert failure.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert (engine.num_open, gateway.num_running) == (0, 0)


@on_event_loop
async def test_the_gateways_own_deadline_ends_the_call_and_closes_the_engines_stream():
    engine = ScriptedEngine(holds=True)
    gateway = make_gateway(engine, timeout_s=0.1)
    async with grpc_channel(gateway) as channel:
        call = InferenceStub(channel).Completion(pb.CompletionRequest(text="Hello"))
        with pytest.raises(grpc.RpcError, match=r"did not finish within 0\.1 s") as failure:
            [chunk async for chunk in call]
    assert failure.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert (engine.num_open, gateway.num_running) == (0, 0)


@on_event_loop
async def test_a_client_that_goes_away_closes_the_engines_stream():
    engine = ScriptedEngine(holds=True)
    gateway = make_gateway(engine)
    async with grpc_channel(gateway) as channel:
        call = InferenceStub(channel).ChatCompletion(
            pb.ChatCompletionRequest(messages=[pb.ChatMessage(role="user", content="Hello")])
        )
        await call.read()
        await channel.close()
        await engine.closed.wait()
    assert (engine.num_open, gateway.num_running) == (0, 0)
