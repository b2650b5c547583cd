"""What the gRPC methods answer: chunks, statuses and metadata, over a real connection."""

import asyncio
import logging
import math

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.request import FinishReason
from deploy.gateway import inference_pb2 as pb
from deploy.gateway.inference_pb2_grpc import InferenceStub
from model_shards.errors import CheckpointError, UnavailableError
from tests.scripted_engine import (
    MAX_MODEL_LEN,
    MODEL,
    ScriptedEngine,
    grpc_channel,
    make_gateway,
    on_event_loop,
    steps_of,
    tokenizer,
    tokens_of,
)

ANSWER = "Whales are large, 鯨."
HELLO = [pb.ChatMessage(role="user", content="Hello")]


def chat(**fields):
    return pb.ChatCompletionRequest(**{"messages": HELLO, **fields})


async def read_into(chunks, call):
    async for chunk in call:
        chunks.append(chunk)  # what came before the error counts


async def failure_of(call):
    """Status, details, trailing metadata of a call, and the chunks before its end."""
    chunks = []
    with pytest.raises(grpc.RpcError) as failure:
        await read_into(chunks, call)
    error = failure.value
    return error.code(), error.details(), dict(error.trailing_metadata()), chunks


@on_event_loop
async def test_a_chat_streams_text_and_tokens_with_reason_and_usage_on_the_last_chunk_only():
    engine = ScriptedEngine(steps_of(ANSWER), FinishReason.STOP, num_cached=3)
    async with grpc_channel(make_gateway(engine)) as channel:
        chunks = [chunk async for chunk in InferenceStub(channel).ChatCompletion(chat(max_tokens=50))]
    (request,) = engine.requests
    assert "".join(chunk.content for chunk in chunks) == ANSWER
    assert [token for chunk in chunks for token in chunk.token_ids] == tokens_of(ANSWER)
    assert {(chunk.id, chunk.model) for chunk in chunks} == {(request.request_id, MODEL)}
    assert {chunk.created for chunk in chunks} == {chunks[0].created}
    assert not any(chunk.HasField("finish_reason") or chunk.HasField("usage") for chunk in chunks[:-1])
    assert chunks[-1].finish_reason == pb.FINISH_REASON_STOP
    prompt, generated = len(request.prompt_token_ids), len(tokens_of(ANSWER))
    assert chunks[-1].usage == pb.Usage(
        prompt_tokens=prompt, completion_tokens=generated, total_tokens=prompt + generated, cached_tokens=3
    )
    assert not any(chunk.logprobs for chunk in chunks)


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        ({"text": "Hello"}, tokenizer().encode("Hello")),
        ({"token_ids": pb.TokenIds(ids=[9, 8, 7])}, [9, 8, 7]),
        ({"text": ""}, tokenizer().encode("")),
    ],
)
@on_event_loop
async def test_a_completion_takes_text_or_token_ids(prompt, ids):
    engine = ScriptedEngine(steps_of(ANSWER))
    async with grpc_channel(make_gateway(engine)) as channel:
        chunks = [chunk async for chunk in InferenceStub(channel).Completion(pb.CompletionRequest(**prompt))]
    assert list(engine.requests[0].prompt_token_ids) == ids
    assert "".join(chunk.text for chunk in chunks) == ANSWER
    assert chunks[-1].finish_reason == pb.FINISH_REASON_LENGTH


@on_event_loop
async def test_fields_that_are_set_reach_the_engine_even_when_they_are_zero():
    engine = ScriptedEngine(top=((5, -0.25),))
    fields = {"temperature": 0.0, "top_p": 0.5, "seed": 0, "top_k": 4, "logprobs": 1, "ignore_eos": True}
    async with grpc_channel(make_gateway(engine)) as channel:
        chunks = [chunk async for chunk in InferenceStub(channel).ChatCompletion(chat(**fields))]
    request = engine.requests[0]
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.seed, sampling.top_k) == (0.0, 0.5, 0, 4)
    assert (sampling.logprobs, request.ignore_eos) == (1, True)
    for chunk in chunks:
        (position,) = chunk.logprobs
        assert (position.chosen.token_id, position.chosen.logprob) == (chunk.token_ids[0], -0.5)
        assert [(top.token_id, top.logprob) for top in position.top] == [(5, -0.25)]


@pytest.mark.parametrize(
    ("request_", "code", "details"),
    [
        (chat(messages=[]), grpc.StatusCode.INVALID_ARGUMENT, "messages must hold at least one message, got none"),
        (
            chat(messages=[pb.ChatMessage(role="robot")]),
            grpc.StatusCode.INVALID_ARGUMENT,
            "messages[0].role must be one of system, user, assistant, got 'robot'",
        ),
        (chat(temperature=math.nan), grpc.StatusCode.INVALID_ARGUMENT, "temperature must be 0 to 2, got nan"),
        (chat(max_tokens=0), grpc.StatusCode.INVALID_ARGUMENT, "max_tokens must be at least 1, got 0"),
        (chat(n=17), grpc.StatusCode.INVALID_ARGUMENT, "n must be 1 to 16, got 17"),
        (chat(n=5), grpc.StatusCode.INVALID_ARGUMENT, "prompts x n must be at most 4, the requests at once, got 5"),
        (
            chat(model="gpt-4"),
            grpc.StatusCode.NOT_FOUND,
            "model 'gpt-4' is not served here; the served model is 'shoal-demo'",
        ),
        (
            pb.CompletionRequest(),
            grpc.StatusCode.INVALID_ARGUMENT,
            "prompt must be text or token_ids, got neither",
        ),
        (
            pb.CompletionRequest(token_ids=pb.TokenIds(ids=[1, 4096])),
            grpc.StatusCode.INVALID_ARGUMENT,
            "token_ids[1] must be 0 to 4095, got 4096",
        ),
        (
            pb.CompletionRequest(token_ids=pb.TokenIds(ids=[])),
            grpc.StatusCode.INVALID_ARGUMENT,
            "the prompt must hold at least one token, got none",
        ),
        (
            pb.CompletionRequest(token_ids=pb.TokenIds(ids=[1] * 128)),
            grpc.StatusCode.INVALID_ARGUMENT,
            "the prompt must leave room for one token in a context of 128 tokens, got 128 tokens",
        ),
    ],
)
@on_event_loop
async def test_a_bad_request_has_its_status_and_says_what_is_wrong(request_, code, details):
    engine = ScriptedEngine()
    async with grpc_channel(make_gateway(engine)) as channel:
        stub = InferenceStub(channel)
        method = stub.ChatCompletion if isinstance(request_, pb.ChatCompletionRequest) else stub.Completion
        assert (await failure_of(method(request_)))[:2] == (code, details)
        assert engine.requests == []
        assert len([chunk async for chunk in stub.ChatCompletion(chat())]) > 0


@on_event_loop
async def test_an_error_about_a_long_value_still_fits_a_grpc_header():
    async with grpc_channel(make_gateway(ScriptedEngine())) as channel:
        code, details, _, _ = await failure_of(InferenceStub(channel).ChatCompletion(chat(model="鯨" * 10_000)))
    assert code is grpc.StatusCode.NOT_FOUND
    assert details.startswith("model '鯨")


@on_event_loop
async def test_overload_carries_its_retry_delay_behind_one_empty_chunk():
    engine = ScriptedEngine()
    async with grpc_channel(make_gateway(engine, max_requests=0)) as channel:
        code, details, trailing, chunks = await failure_of(InferenceStub(channel).ChatCompletion(chat()))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "takes 0 requests at once" in details
    assert trailing["retry-after-ms"] == "1000"
    assert chunks == [pb.ChatCompletionChunk()]


@pytest.mark.parametrize(
    ("error", "code", "details"),
    [
        (UnavailableError("a rank was lost"), grpc.StatusCode.UNAVAILABLE, "a rank was lost"),
        (ValueError("secret path"), grpc.StatusCode.INTERNAL, "internal error; the server's log has it as request "),
        (CheckpointError("secret path"), grpc.StatusCode.INTERNAL, "internal error; the server's log has it as "),
    ],
)
@on_event_loop
async def test_an_engine_that_fails_midway_ends_the_stream_with_its_status(error, code, details):
    engine = ScriptedEngine(steps_of(ANSWER), error=error)
    async with grpc_channel(make_gateway(engine)) as channel:
        told_code, told, _, chunks = await failure_of(InferenceStub(channel).ChatCompletion(chat()))
    assert told_code is code
    assert told.startswith(details)
    assert "secret" not in told
    assert code is not grpc.StatusCode.INTERNAL or told.endswith(engine.requests[0].request_id)
    assert len(chunks) == len(engine.steps) - 1


@on_event_loop
async def test_each_of_n_choices_has_its_index_and_reason_and_the_last_chunk_the_usage_of_all():
    engine = ScriptedEngine(steps_of(ANSWER))
    async with grpc_channel(make_gateway(engine)) as channel:
        stub = InferenceStub(channel)
        told = [chunk async for chunk in stub.ChatCompletion(chat(n=3))]
        continued = [chunk async for chunk in stub.Completion(pb.CompletionRequest(text="Hello", n=3))]
    for chunks, prompt in zip((told, continued), (engine.requests[0], engine.requests[-1]), strict=True):
        assert len({chunk.id for chunk in chunks}) == 1
        for index in range(3):
            choice = [chunk for chunk in chunks if chunk.index == index]
            assert [token for chunk in choice for token in chunk.token_ids] == tokens_of(ANSWER)
            assert [chunk.HasField("finish_reason") for chunk in choice] == [False] * (len(choice) - 1) + [True]
        assert [chunk.HasField("usage") for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
        assert chunks[-1].usage.prompt_tokens == len(prompt.prompt_token_ids)
        assert chunks[-1].usage.completion_tokens == 3 * len(tokens_of(ANSWER))


@on_event_loop
async def test_the_request_id_of_the_client_comes_back_and_finds_the_log_lines(caplog):
    caplog.set_level(logging.INFO, "deploy.gateway")
    metadata = (("x-request-id", "mine"),)
    engine = ScriptedEngine(steps_of(ANSWER))
    async with grpc_channel(make_gateway(engine)) as channel:
        call = InferenceStub(channel).ChatCompletion(chat(n=2), metadata=metadata)
        assert len([chunk async for chunk in call]) > 0
        assert dict(await call.trailing_metadata())["x-request-id"] == "mine"
        engine.error = ValueError("secret")
        code, details, _, _ = await failure_of(InferenceStub(channel).ChatCompletion(chat(), metadata=metadata))
    assert (code, details) == (
        grpc.StatusCode.INTERNAL,
        "internal error; the server's log has it as request mine",
    )
    ended = [record.fields for record in caplog.records if record.getMessage() == "request ended"]
    assert [fields["x_request_id"] for fields in ended] == ["mine"] * 3
    assert [fields["request_id"] for fields in ended] == [request.request_id for request in engine.requests]
    assert [r.fields["request_id"] for r in caplog.records if r.getMessage() == "internal error"] == ["mine"]


@on_event_loop
async def test_overload_gives_the_clients_request_id_back_too():
    async with grpc_channel(make_gateway(ScriptedEngine(), max_requests=0)) as channel:
        call = InferenceStub(channel).ChatCompletion(chat(), metadata=(("x-request-id", "m" * 200),))
        _, _, trailing, _ = await failure_of(call)
    assert (trailing["x-request-id"], trailing["retry-after-ms"]) == ("m" * 128, "1000")


@on_event_loop
async def test_models_are_listed_and_texts_tokenized_both_ways():
    async with grpc_channel(make_gateway(ScriptedEngine())) as channel:
        stub = InferenceStub(channel)
        models = await stub.ListModels(pb.ListModelsRequest())
        tokens = await stub.Tokenize(pb.TokenizeRequest(text=ANSWER))
        text = await stub.Detokenize(pb.DetokenizeRequest(token_ids=tokens.token_ids))
    vocab_size = tokenizer().vocab_size
    assert list(models.models) == [pb.Model(id=MODEL, max_model_len=MAX_MODEL_LEN, vocab_size=vocab_size)]
    assert list(tokens.token_ids.ids) == tokenizer().encode(ANSWER)
    assert text.text == ANSWER


@on_event_loop
async def test_tokenize_and_detokenize_refuse_what_they_cannot_do():
    async with grpc_channel(make_gateway(ScriptedEngine())) as channel:
        stub = InferenceStub(channel)
        with pytest.raises(grpc.RpcError, match="'gpt-4' is not served") as unknown:
            await stub.Tokenize(pb.TokenizeRequest(model="gpt-4", text="a"))
        with pytest.raises(grpc.RpcError, match=r"token_ids\[0\] must be 0 to 4095, got -1") as outside:
            await stub.Detokenize(pb.DetokenizeRequest(token_ids=pb.TokenIds(ids=[-1])))
    assert unknown.value.code() is grpc.StatusCode.NOT_FOUND
    assert outside.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@on_event_loop
async def test_the_health_check_follows_the_gateway_and_knows_one_service():
    gateway = make_gateway(ScriptedEngine())
    async with grpc_channel(gateway) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", "shoal.v1.Inference"):
            answer = await health.Check(health_pb2.HealthCheckRequest(service=service))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError, match="got 'other'") as unknown:
            await health.Check(health_pb2.HealthCheckRequest(service="other"))
        assert unknown.value.code() is grpc.StatusCode.NOT_FOUND
        async with asyncio.timeout(5.0):
            await gateway.drain()
        answer = await health.Check(health_pb2.HealthCheckRequest())
        assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
        code, details, _, _ = await failure_of(InferenceStub(channel).ChatCompletion(chat()))
        assert (code, "draining" in details) == (grpc.StatusCode.UNAVAILABLE, True)
