"""The HTTP side as OpenAI's own client sees it."""

import contextlib

import httpx
import openai
import pytest

from cluster.request import FinishReason
from deploy.gateway.http import create_http_app
from model_shards.errors import UnavailableError
from tests.scripted_engine import (
    MAX_MODEL_LEN,
    MODEL,
    ScriptedEngine,
    make_gateway,
    on_event_loop,
    steps_of,
    tokenizer,
    tokens_of,
)

ANSWER = "Whales are large."
HELLO = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
TOP = ((tokens_of(" large")[0], -0.5), (tokens_of(" are")[0], float("-inf")))


@contextlib.asynccontextmanager
async def openai_client(engine, **limits):
    gateway = make_gateway(engine, **limits)
    transport = httpx.ASGITransport(create_http_app(lambda: gateway))
    async with (
        httpx.AsyncClient(transport=transport) as http,
        openai.AsyncOpenAI(base_url="http://gateway/v1", api_key="none", http_client=http, max_retries=0) as client,
    ):
        yield client
    assert (engine.num_open, gateway.num_running) == (0, 0)


@on_event_loop
async def test_a_chat_is_answered_whole():
    engine = ScriptedEngine(steps_of(ANSWER), FinishReason.STOP, num_cached=3)
    async with openai_client(engine) as client:
        answer = await client.chat.completions.create(model=MODEL, messages=HELLO)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", ANSWER, "stop")
    assert choice.logprobs is None
    assert answer.object == "chat.completion"
    assert answer.model == MODEL
    assert answer.id == engine.requests[0].request_id
    assert answer.usage.prompt_tokens == len(engine.requests[0].prompt_token_ids)
    assert answer.usage.completion_tokens == len(tokens_of(ANSWER))
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details.cached_tokens == 3


@on_event_loop
async def test_a_chat_is_streamed_with_the_role_first_and_the_usage_last():
    async with openai_client(ScriptedEngine(steps_of(ANSWER))) as client:
        stream = await client.chat.completions.create(
            model=MODEL, messages=HELLO, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    *told, last = chunks
    assert "".join(chunk.choices[0].delta.content or "" for chunk in told) == ANSWER
    assert [chunk.choices[0].finish_reason for chunk in told] == [None] * (len(told) - 1) + ["length"]
    assert last.choices == []
    assert last.usage.completion_tokens == len(tokens_of(ANSWER))
    assert all("usage" in chunk.model_fields_set and chunk.usage is None for chunk in told)


@on_event_loop
async def test_a_stream_has_no_usage_unless_asked():
    async with openai_client(ScriptedEngine()) as client:
        stream = await client.completions.create(model=MODEL, prompt="Hello", stream=True)
        chunks = [chunk async for chunk in stream]
    assert all("usage" not in chunk.model_fields_set and len(chunk.choices) == 1 for chunk in chunks)
    assert "".join(chunk.choices[0].text for chunk in chunks) == ANSWER
    assert chunks[-1].choices[0].finish_reason == "length"


@pytest.mark.parametrize("prompt", ["Hello", ["Hello"], [9, 8, 7], [[9, 8, 7]]])
@on_event_loop
async def test_a_completion_takes_text_or_token_ids_alone_or_in_a_list(prompt):
    engine = ScriptedEngine()
    async with openai_client(engine) as client:
        answer = await client.completions.create(model=MODEL, prompt=prompt)
    assert (answer.object, answer.choices[0].text) == ("text_completion", ANSWER)
    text = "Hello" in prompt
    assert engine.requests[0].prompt_token_ids == (tuple(tokenizer().encode("Hello")) if text else (9, 8, 7))


NULLS = ["temperature", "top_p", "seed", "stop", "n", "presence_penalty", "frequency_penalty", "logprobs"]
CHAT_NULLS = ["max_tokens", "max_completion_tokens", "top_logprobs", "tools", "tool_choice", "response_format"]
EXTRA_NULLS = ["top_k", "ignore_eos", "repetition_penalty", "min_p"]


def nulls(*names):
    return dict.fromkeys([*NULLS, "stream", "stream_options", "logit_bias", "user", *names])


@on_event_loop
async def test_null_is_a_field_that_was_not_given():
    engine, extra = ScriptedEngine(), dict.fromkeys(EXTRA_NULLS)
    async with openai_client(engine) as client:
        await client.chat.completions.create(model=None, messages=HELLO, **nulls(*CHAT_NULLS), extra_body=extra)
        completion_nulls = nulls("max_tokens", "echo", "best_of", "suffix")
        await client.completions.create(model=None, prompt="Hello", **completion_nulls, extra_body=extra)
        await client.chat.completions.create(model=MODEL, messages=HELLO)
        await client.completions.create(model=MODEL, prompt="Hello")
    given_null, left_out = (
        [(request.max_tokens, request.ignore_eos) for request in part]
        for part in (engine.requests[:2], engine.requests[2:])
    )
    assert given_null == left_out


@on_event_loop
async def test_null_in_the_stream_options_is_a_field_that_was_not_given():
    async with openai_client(ScriptedEngine()) as client:
        stream = await client.chat.completions.create(
            model=MODEL, messages=HELLO, stream=True, stream_options={"include_usage": None}
        )
        assert {chunk.usage async for chunk in stream} == {None}


HARMLESS = {"user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "logit_bias": {}}


@on_event_loop
async def test_fields_that_say_nothing_about_the_answer_are_ignored():
    async with openai_client(ScriptedEngine(steps_of(ANSWER))) as client:
        chat = await client.chat.completions.create(
            model=MODEL,
            messages=[*HELLO, {"role": "assistant", "content": "Hi", "name": "a", "tool_calls": [], "refusal": None}],
            response_format={"type": "text"},
            tools=[],
            tool_choice="auto",
            modalities=["text"],
            parallel_tool_calls=True,
            **HARMLESS,
        )
        extra = {**HARMLESS, "min_p": 0, "unknown_field": 1}
        completion = await client.completions.create(
            model=MODEL, prompt="Hello", echo=False, best_of=1, suffix="", extra_body=extra
        )
    assert (chat.choices[0].message.content, completion.choices[0].text) == (ANSWER, ANSWER)


@pytest.mark.parametrize("stop", ["are", ["never", "are"]])
@on_event_loop
async def test_a_stop_string_ends_the_answer(stop):
    async with openai_client(ScriptedEngine(steps_of(ANSWER), holds=True)) as client:
        answer = await client.chat.completions.create(model=MODEL, messages=HELLO, stop=stop)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("Whales ", "stop")


@pytest.mark.parametrize(
    ("fields", "max_tokens"),
    [
        ({"max_tokens": 5}, 5),
        ({"max_completion_tokens": 6}, 6),
        ({"max_tokens": 5, "max_completion_tokens": 6}, 6),
        ({}, None),
    ],
)
@on_event_loop
async def test_max_completion_tokens_is_the_newer_name_of_max_tokens(fields, max_tokens):
    engine = ScriptedEngine()
    async with openai_client(engine) as client:
        await client.chat.completions.create(model=MODEL, messages=HELLO, **fields)
    (request,) = engine.requests
    assert request.max_tokens == (max_tokens or MAX_MODEL_LEN - len(request.prompt_token_ids))


@on_event_loop
async def test_sampling_fields_reach_the_engine():
    engine = ScriptedEngine()
    async with openai_client(engine) as client:
        await client.chat.completions.create(
            model=MODEL,
            messages=HELLO,
            temperature=0,
            top_p=0.5,
            seed=3,
            presence_penalty=1,
            frequency_penalty=-1,
            extra_body={"top_k": 4, "repetition_penalty": 1.5, "ignore_eos": True, "unknown_field": 1},
        )
    (request,) = engine.requests
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed) == (0.0, 0.5, 4, 3)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (1.0, -1.0, 1.5)
    assert request.ignore_eos


@on_event_loop
async def test_content_may_come_in_text_parts():
    engine = ScriptedEngine()
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    async with openai_client(engine) as client:
        for content in ("Hello", parts):
            await client.chat.completions.create(model="", messages=[{"role": "user", "content": content}])
    assert engine.requests[0].prompt_token_ids == engine.requests[1].prompt_token_ids


@on_event_loop
async def test_chat_log_probabilities_have_one_entry_a_token_and_no_infinity():
    async with openai_client(ScriptedEngine(steps_of(ANSWER), top=TOP)) as client:
        answer = await client.chat.completions.create(model=MODEL, messages=HELLO, logprobs=True, top_logprobs=2)
    entries = answer.choices[0].logprobs.content
    assert "".join(entry.token for entry in entries) == ANSWER
    assert b"".join(bytes(entry.bytes) for entry in entries).decode() == ANSWER
    assert all(entry.logprob == -0.5 for entry in entries)
    assert [(top.token, top.logprob) for top in entries[0].top_logprobs] == [(" large", -0.5), (" are", -9999.0)]


@on_event_loop
async def test_half_a_character_has_the_bytes_of_its_token_and_an_end_token_its_own_text():
    text, eos = "ein 🐋", tokenizer().eos_token_ids[0]
    steps = [*steps_of(text), (eos,)]
    async with openai_client(ScriptedEngine(steps, FinishReason.STOP, top=((eos, -0.1),))) as client:
        answer = await client.chat.completions.create(model=MODEL, messages=HELLO, logprobs=True, top_logprobs=1)
    *entries, last = answer.choices[0].logprobs.content
    assert len(tokens_of("🐋")) > 1
    assert bytes(byte for entry in entries for byte in entry.bytes).decode() == text
    assert entries[-1].token == "bytes:" + "".join(f"\\x{byte:02x}" for byte in entries[-1].bytes)
    assert (last.token, bytes(last.bytes).decode()) == ("<｜end▁of▁sentence｜>",) * 2
    assert [top.token for top in last.top_logprobs] == ["<｜end▁of▁sentence｜>"]


@on_event_loop
async def test_tokens_that_are_no_text_alone_do_not_take_each_others_place_among_the_best():
    halves = list(dict.fromkeys(tokens_of("🐋") + tokens_of("鯱")))
    unused = [tokenizer().eos_token_ids[0], tokenizer().bos_token_id]
    top = tuple((token, -1.0 - index) for index, token in enumerate([*halves, *unused]))
    assert len({tokenizer().decode([token]) for token, _ in top}) < len(top)
    async with openai_client(ScriptedEngine(steps_of("a"), top=top)) as client:
        answer = await client.completions.create(model=MODEL, prompt="Hello", logprobs=len(top))
    (best,) = answer.choices[0].logprobs.top_logprobs
    assert list(best.values()) == [value for _, value in top]


@pytest.mark.parametrize("stop", [None, "鯱 x"])
@on_event_loop
async def test_the_offset_of_a_token_is_where_its_text_stands_whatever_the_length_of_characters_in_tokens(stop):
    text = "ein 🐋🐋 und 鯱 zwei"
    async with openai_client(ScriptedEngine(steps_of(text), top=())) as client:
        answer = await client.completions.create(model=MODEL, prompt="Hello", logprobs=0, stop=stop)
    (choice,) = answer.choices
    assert choice.text == text
    pairs = list(zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True))
    for token, offset in pairs:
        assert token.startswith("bytes:") or text[offset:].startswith(token)
    whale = text.index("🐋")
    assert [offset for _, offset in pairs].count(whale) >= len(tokens_of("🐋")) - 1
    assert pairs[-1][1] == len(text) - len(pairs[-1][0])


@on_event_loop
async def test_completion_log_probabilities_are_the_same_streamed_and_whole():
    async with openai_client(ScriptedEngine(steps_of(ANSWER), top=TOP)) as client:
        whole = (await client.completions.create(model=MODEL, prompt="Hello", logprobs=2)).choices[0].logprobs
        stream = await client.completions.create(model=MODEL, prompt="Hello", logprobs=2, stream=True)
        parts = [chunk.choices[0].logprobs async for chunk in stream]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [entry for part in parts for entry in getattr(part, name)] == getattr(whole, name)
    assert "".join(whole.tokens) == ANSWER
    assert [ANSWER[at:].startswith(token) for at, token in zip(whole.text_offset, whole.tokens, strict=True)]
    assert whole.top_logprobs[0] == {" large": -0.5, " are": -9999.0}


@on_event_loop
async def test_several_prompts_and_choices_are_answered_in_their_order():
    engine = ScriptedEngine(steps_of(ANSWER))
    async with openai_client(engine) as client:
        ids = await client.completions.create(model=MODEL, prompt=[[9, 8], [7]], n=2, best_of=2, seed=3)
        texts = await client.completions.create(model=MODEL, prompt=["Hello", "Hello there"])
    assert [(choice.index, choice.text, choice.finish_reason) for choice in ids.choices] == [
        (index, ANSWER, "length") for index in range(4)
    ]
    assert (ids.usage.prompt_tokens, ids.usage.completion_tokens) == (3, 4 * len(tokens_of(ANSWER)))
    assert [choice.index for choice in texts.choices] == [0, 1]
    assert [request.prompt_token_ids for request in engine.requests] == [
        *[(9, 8)] * 2,
        *[(7,)] * 2,
        tuple(tokenizer().encode("Hello")),
        tuple(tokenizer().encode("Hello there")),
    ]


@on_event_loop
async def test_choices_of_a_chat_are_answered_whole_and_streamed_each_with_its_role_and_end():
    engine = ScriptedEngine(steps_of(ANSWER), FinishReason.STOP)
    async with openai_client(engine) as client:
        whole = await client.chat.completions.create(model=MODEL, messages=HELLO, n=3)
        stream = await client.chat.completions.create(
            model=MODEL, messages=HELLO, n=3, stream=True, stream_options={"include_usage": True}
        )
        *told, last = [chunk async for chunk in stream]
    assert [(choice.index, choice.message.content, choice.finish_reason) for choice in whole.choices] == [
        (index, ANSWER, "stop") for index in range(3)
    ]
    assert last.usage == whole.usage
    assert whole.usage.completion_tokens == 3 * len(tokens_of(ANSWER))
    assert len({chunk.id for chunk in told}) == 1
    for index in range(3):
        choices = [chunk.choices[0] for chunk in told if chunk.choices[0].index == index]
        assert [choice.delta.role for choice in choices] == ["assistant"] + [None] * (len(choices) - 1)
        assert "".join(choice.delta.content or "" for choice in choices) == ANSWER
        assert [choice.finish_reason for choice in choices] == [None] * (len(choices) - 1) + ["stop"]


@pytest.mark.parametrize("seed", [-1, -(2**63), 2**63 - 1])
@on_event_loop
async def test_every_integer_of_64_bits_is_a_seed(seed):
    engine = ScriptedEngine()
    async with openai_client(engine) as client:
        await client.chat.completions.create(model=MODEL, messages=HELLO, seed=seed, top_p=0)
    sampling = engine.requests[0].sampling
    assert sampling.seed == seed % 2**64
    assert sampling.top_k == 1


@on_event_loop
async def test_a_developer_speaks_as_the_system():
    engine = ScriptedEngine()
    async with openai_client(engine) as client:
        for role in ("system", "developer"):
            messages = [{"role": role, "content": "Be brief."}, {"role": "user", "content": "Hello"}]
            await client.chat.completions.create(model=MODEL, messages=messages)
    assert engine.requests[0].prompt_token_ids == engine.requests[1].prompt_token_ids


@on_event_loop
async def test_the_served_model_is_shown_and_another_is_not_found():
    async with openai_client(ScriptedEngine()) as client:
        model = await client.models.retrieve(MODEL)
        with pytest.raises(openai.NotFoundError) as unknown:
            await client.models.retrieve("gpt-4")
    assert (model.id, model.object, model.max_model_len) == (MODEL, "model", MAX_MODEL_LEN)
    assert unknown.value.code == "model_not_found"


@on_event_loop
async def test_the_served_model_is_listed():
    async with openai_client(ScriptedEngine()) as client:
        models = [model async for model in client.models.list()]
    assert [model.id for model in models] == [MODEL]
    assert models[0].max_model_len == MAX_MODEL_LEN


@pytest.mark.parametrize("stream", [False, True])
@on_event_loop
async def test_what_fails_before_the_first_token_has_its_own_status(stream):
    engine = ScriptedEngine(steps_of("x"), error=UnavailableError("no replica"))
    async with openai_client(engine) as client:
        with pytest.raises(openai.InternalServerError) as failure:
            await client.chat.completions.create(model=MODEL, messages=HELLO, stream=stream)
    assert failure.value.status_code == 503
    assert failure.value.body["message"] == "no replica"


@pytest.mark.parametrize("kind", [TimeoutError, ConnectionError, OSError])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("num_steps", [1, 3], ids=["before the first token", "between tokens"])
@on_event_loop
async def test_an_engine_that_fails_as_a_connection_does_is_an_internal_error(kind, stream, num_steps):
    async def ask(client):
        answer = await client.chat.completions.create(model=MODEL, messages=HELLO, stream=stream)
        return [chunk async for chunk in answer]

    async with openai_client(ScriptedEngine([(300,)] * num_steps, error=kind("secret path"))) as client:
        with pytest.raises(openai.APIError, match="internal error") as failure:
            await ask(client)
    begun = stream and num_steps > 1  # then the status is sent already
    assert isinstance(failure.value, openai.InternalServerError) == (not begun)


@pytest.mark.parametrize(
    ("error", "message"), [(UnavailableError("a rank was lost"), "^a rank was lost$"), (ValueError("x"), "internal")]
)
@on_event_loop
async def test_what_fails_in_a_stream_reaches_the_client_as_an_error(error, message):
    async with openai_client(ScriptedEngine(steps_of(ANSWER), error=error)) as client:
        stream = await client.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
        with pytest.raises(openai.APIError, match=message):
            [chunk async for chunk in stream]


@on_event_loop
async def test_a_full_gateway_is_a_rate_limit_with_a_retry_delay():
    engine = ScriptedEngine()
    async with openai_client(engine, max_requests=0) as client:
        with pytest.raises(openai.RateLimitError) as refusal:
            await client.chat.completions.create(model=MODEL, messages=HELLO)
    assert refusal.value.response.headers["retry-after"] == "1"
    assert engine.requests == []


@on_event_loop
async def test_a_request_out_of_time_is_a_timeout():
    async with openai_client(ScriptedEngine(steps_of("x"), holds=True), timeout_s=0.02) as client:
        with pytest.raises(openai.InternalServerError) as failure:
            await client.completions.create(model=MODEL, prompt="Hello")
    assert failure.value.status_code == 504
