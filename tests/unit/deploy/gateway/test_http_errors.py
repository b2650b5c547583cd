"""Bad input over HTTP: the right status, an error in OpenAI's shape, and a service that still answers."""

import asyncio
import contextlib
import json
import logging

import httpx
import pytest
from ray.serve._private.http_util import RequestIdMiddleware

from deploy.gateway.http import create_http_app
from deploy.gateway.http.body import MAX_BODY_BYTES
from model_shards.errors import UnavailableError
from tests.scripted_engine import MODEL, ScriptedEngine, make_gateway, on_event_loop

CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "Hello"}]


@contextlib.asynccontextmanager
async def http_client(gateway):
    transport = httpx.ASGITransport(RequestIdMiddleware(create_http_app(lambda: gateway)))  # as Serve's proxy has it
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        yield client


def assert_openai_error(answer, status, message):
    assert answer.status_code == status
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert message in error["message"]
    assert len(answer.headers.get_list("x-request-id")) == 1


async def refused(path, content, status, message, method="POST"):
    engine = ScriptedEngine()
    gateway = make_gateway(engine)
    async with http_client(gateway) as client:
        answer = await client.request(method, path, content=content)
        assert_openai_error(answer, status, message)
        assert (engine.requests, gateway.num_running) == ([], 0)
        assert (await client.post(COMPLETE, json={"prompt": "Hello"})).status_code == 200
    return answer


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"prompt": "\xff"}', "the body must be UTF-8, got byte 0xff at 12"),
        (b"", "the body must be JSON: EOF"),
        (b'{"prompt": ', "the body must be JSON: EOF"),
        (b"prompt=Hello", "the body must be JSON: expected value"),
        (b'{"prompt": "\\ud800"}', "the body must be JSON: "),
        (b"[" * 100_000, "the body must be JSON: recursion limit exceeded"),
        (b'{"prompt": "a", "other": ' + b'{"a":' * 100_000, "the body must be JSON: recursion limit exceeded"),
        (b'{"prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}", "the body must be JSON: number out of range"),
        (b"3", "the body: Input should be an object, got 3"),
        (b"{}", "prompt: Field required"),
        (b'{"prompt": "a", "temperature": NaN}', "temperature must be 0 to 2, got nan"),
        (b'{"prompt": "a", "temperature": 1e999}', "temperature must be 0 to 2, got inf"),
        (b'{"prompt": "a", "temperature": "1"}', "temperature: Input should be a valid number, got '1'"),
        (b'{"prompt": "a", "max_tokens": 0}', "max_tokens must be at least 1, got 0"),
        (b'{"prompt": "a", "max_tokens": -1}', "max_tokens must be at least 1, got -1"),
        (b'{"prompt": "a", "max_tokens": 1.5}', "max_tokens: Input should be a valid integer, got 1.5"),
        (b'{"prompt": "a", "max_tokens": true}', "max_tokens: Input should be a valid integer, got True"),
        (b'{"prompt": "a", "max_tokens": 1000}', "must fit a context of 128 tokens, got 2 + 1000"),
        (b'{"prompt": [1, 4096]}', "token_ids[1] must be 0 to 4095, got 4096"),
        (b'{"prompt": [-1]}', "token_ids[0] must be 0 to 4095, got -1"),
        (b'{"prompt": []}', "prompt must hold at least one token, got an empty list"),
        (b'{"prompt": [[]]}', "the prompt must hold at least one token, got none"),
        (b'{"prompt": [[1], []]}', "prompt 1: the prompt must hold at least one token, got none"),
        (b'{"prompt": ["a", "b", "c"], "n": 2}', "prompts x n must be at most 4, the requests at once, got 6"),
        (b'{"prompt": [1, "a"]}', "prompt: must be a string, a list of token ids, or a list of either"),
        (b'{"prompt": null}', "prompt: must be a string, a list of token ids, or a list of either, got None"),
        (b'{"prompt": "a", "best_of": 3}', "best_of must be n, 1, got 3"),
        (b'{"prompt": "a", "stop": [3]}', "stop: must be a string or a list of strings, got [3]"),
        (b'{"prompt": "a", "stop": ""}', "stop[0] must be 1 to 256 characters long, got 0"),
        (b'{"prompt": "a", "n": 17}', "n must be 1 to 16, got 17"),
    ],
)
@on_event_loop
async def test_a_bad_completion_is_refused_by_what_is_wrong_with_it(content, message):
    await refused(COMPLETE, content, 400, message)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "messages must hold at least one message, got none"),
        ({"messages": []}, "messages must hold at least one message, got none"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "messages[0].role must be one of"),
        ({"messages": [{"role": "user"}]}, "messages.0.content: Field required"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages.0.content: must be a string or a list of parts"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages.0.content: must be a string or a list of parts of type text",
        ),
        ({"messages": HELLO, "max_completion_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"messages": HELLO, "top_logprobs": 3}, "top_logprobs needs logprobs to be true, got 3"),
        ({"messages": HELLO, "logprobs": True, "top_logprobs": 21}, "logprobs must be 0 to 20, got 21"),
        ({"messages": [{"role": "user", "content": "word " * 200}]}, "must leave room for one token in a context"),
        ({"messages": [{"role": "user", "content": "a" * 9000}]}, "messages must be at most 8192 bytes"),
    ],
)
@on_event_loop
async def test_a_bad_chat_is_refused_by_what_is_wrong_with_it(body, message):
    await refused(CHAT, json.dumps(body).encode(), 400, message)


TOOL = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize(
    ("path", "field", "value", "rule"),
    [
        (COMPLETE, "echo", True, "it must be false, got true"),
        (COMPLETE, "echo", 0, "it must be false, got 0"),
        (COMPLETE, "suffix", "end", 'it must be "", got "end"'),
        (COMPLETE, "logit_bias", {"5": -100}, 'it must be {}, got {"5":-100}'),
        (COMPLETE, "min_p", 0.1, "it must be 0 or 0.0, got 0.1"),
        (COMPLETE, "stop_token_ids", [3], "it must be [], got [3]"),
        (COMPLETE, "guided_regex", "a*", 'it must be left out, got "a*"'),
        (CHAT, "response_format", {"type": "json_object"}, 'it must be {"type":"text"}, got {"type":"json_object"}'),
        (CHAT, "tools", [TOOL], 'it must be [], got [{"type":"function"'),
        (CHAT, "tool_choice", "required", 'it must be "none" or "auto", got "required"'),
        (CHAT, "functions", [{"name": "f"}], "it must be []"),
        (CHAT, "logit_bias", {"5": -100}, "it must be {}"),
        (CHAT, "modalities", ["text", "audio"], 'it must be ["text"]'),
        (CHAT, "audio", {"voice": "ash"}, "it must be left out"),
        (CHAT, "reasoning_effort", "high", 'it must be "none"'),
        (CHAT, "guided_json", {"a": "b" * 100_000}, "it must be left out"),
    ],
)
@on_event_loop
async def test_a_field_that_would_change_the_answer_and_is_not_served_is_refused_by_name(path, field, value, rule):
    body = {"prompt": "a", field: value} if path == COMPLETE else {"messages": HELLO, field: value}
    answer = await refused(path, json.dumps(body).encode(), 400, f"{field} is not served: {rule}")
    assert len(answer.content) < 400


@on_event_loop
async def test_a_tool_call_in_a_message_is_refused():
    message = {"role": "assistant", "content": "", "tool_calls": [{"id": "1", **TOOL}]}
    await refused(CHAT, json.dumps({"messages": [message]}).encode(), 400, "tool_calls is not served")


@on_event_loop
async def test_an_unknown_model_is_not_found():
    body = json.dumps({"model": "gpt-4", "messages": HELLO}).encode()
    answer = await refused(CHAT, body, 404, "'gpt-4' is not served here")
    assert answer.json()["error"]["code"] == "model_not_found"
    shown = await refused("/v1/models/org/gpt-4", None, 404, "'org/gpt-4' is not served here", "GET")
    assert shown.json()["error"]["code"] == "model_not_found"


@on_event_loop
async def test_an_error_about_a_long_value_stays_short():
    answer = await refused(COMPLETE, json.dumps({"prompt": [1, "b" * 100_000]}).encode(), 400, "prompt: must be")
    assert len(answer.content) < 400


@pytest.mark.parametrize("announced", [True, False])
@on_event_loop
async def test_a_body_that_is_too_large_is_refused_as_such(announced):
    async def parts():
        for _ in range(MAX_BODY_BYTES // 2**20 + 1):
            yield b" " * 2**20

    content = b" " * (MAX_BODY_BYTES + 1) if announced else parts()
    await refused(COMPLETE, content, 413, f"the body must be at most {MAX_BODY_BYTES} bytes")


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("POST", "/v1/embeddings", 404, "not_found"),
        ("GET", "/", 404, "not_found"),
        ("GET", CHAT, 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
    ],
)
@on_event_loop
async def test_an_unknown_route_or_method_is_an_error_in_openais_shape(method, path, status, code):
    answer = await refused(path, None, status, f"{method} {path}", method)
    assert answer.json()["error"]["code"] == code
    assert ("allow" in answer.headers) == (status == 405)


@on_event_loop
async def test_an_internal_error_names_the_request_and_nothing_else():
    engine = ScriptedEngine([(300,)], error=ValueError("secret path"))
    async with http_client(make_gateway(engine)) as client:
        answer = await client.post(COMPLETE, json={"prompt": "a"}, headers={"x-request-id": "mine"})
    assert_openai_error(answer, 500, "internal error; the server's log has it as request mine")
    assert answer.headers["x-request-id"] == "mine"
    assert "secret" not in answer.text


@on_event_loop
async def test_a_failing_choice_ends_the_stream_of_all_with_one_error():
    engine = ScriptedEngine([(300,), (300,)], error=UnavailableError("a rank was lost"))
    async with http_client(make_gateway(engine)) as client:
        answer = await client.post(CHAT, json={"messages": HELLO, "n": 3, "stream": True})
    *told, error, done, end = answer.text.split("\n\n")
    assert not any('"error"' in event for event in told)
    assert json.loads(error.removeprefix("data: "))["error"]["message"] == "a rank was lost"
    assert (done, end) == ("data: [DONE]", "")
    assert engine.num_open == 0


@pytest.mark.parametrize("stream", [False, True])
@on_event_loop
async def test_the_request_id_of_the_answer_finds_the_log_lines(stream, caplog):
    caplog.set_level(logging.INFO, "deploy.gateway")
    engine = ScriptedEngine([(300,), (300,)], error=ValueError("secret path"))
    async with http_client(make_gateway(engine)) as client:
        for body, headers in (({"n": 2}, {"x-request-id": "mine"}), ({}, {})):
            caplog.clear()
            answer = await client.post(COMPLETE, json={"prompt": "a", "stream": stream, **body}, headers=headers)
            named = answer.headers["x-request-id"]
            assert f"the server's log has it as request {named}" in answer.text
            ended = [record.fields for record in caplog.records if record.getMessage() == "request ended"]
            assert [fields["x_request_id"] for fields in ended] == [named] * body.get("n", 1)
            failed = [record.fields for record in caplog.records if record.getMessage() == "internal error"]
            assert [fields["request_id"] for fields in failed] == [named]


@on_event_loop
async def test_the_request_id_of_the_client_comes_back_and_others_are_made():
    async with http_client(make_gateway(ScriptedEngine())) as client:
        given = await client.get("/v1/models", headers={"x-request-id": "mine"})
        made = [(await client.get("/v1/models")).headers["x-request-id"] for _ in range(2)]
    assert given.headers.get_list("x-request-id") == ["mine"]
    assert len({*made, "mine"}) == 3


@on_event_loop
async def test_health_says_ok_until_the_gateway_drains_and_then_requests_are_unavailable():
    gateway = make_gateway(ScriptedEngine())
    async with http_client(gateway) as client:
        healthy = await client.get("/healthz")
        assert (healthy.status_code, healthy.json()) == (200, {"status": "ok"})
        async with asyncio.timeout(5.0):
            await gateway.drain()
        draining = await client.get("/healthz")
        assert (draining.status_code, draining.json()) == (503, {"status": "draining"})
        assert_openai_error(await client.post(CHAT, json={"model": MODEL, "messages": HELLO}), 503, "draining")
