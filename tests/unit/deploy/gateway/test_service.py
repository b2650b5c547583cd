"""Which requests the gateway takes, what it asks of the engine, and that each one ends exactly once."""

import asyncio
import logging
import threading
from contextlib import aclosing

import pytest

from cluster.request import FinishReason
from deploy.gateway.validation import SamplingFields
from deploy.text.messages import ChatMessage
from model_shards.errors import (
    DeadlineError,
    FailedRequestError,
    InvalidRequestError,
    OverloadedError,
    UnavailableError,
)
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

HELLO = [ChatMessage("user", "Hello")]


async def read(generation):
    async with aclosing(generation):
        return [event async for event in generation]


def endings(caplog):
    return [record.fields["ending"] for record in caplog.records if record.getMessage() == "request ended"]


@on_event_loop
async def test_a_text_prompt_reaches_the_engine_as_tokens_with_the_settings_of_the_client():
    engine = ScriptedEngine()
    fields = SamplingFields(max_tokens=9, temperature=0.5, seed=3, ignore_eos=True)
    await read(await make_gateway(engine).complete("", "Hello there", fields))
    (request,) = engine.requests
    assert list(request.prompt_token_ids) == tokenizer().encode("Hello there")
    assert (request.max_tokens, request.sampling.temperature, request.sampling.seed) == (9, 0.5, 3)
    assert request.ignore_eos
    assert request.eos_token_ids == tokenizer().eos_token_ids


@on_event_loop
async def test_token_ids_are_taken_as_they_are_and_a_completion_has_16_tokens_by_default():
    engine = ScriptedEngine()
    await read(await make_gateway(engine).complete(MODEL, [9, 8, 7], SamplingFields()))
    assert engine.requests[0].prompt_token_ids == (9, 8, 7)
    assert engine.requests[0].max_tokens == 16


@on_event_loop
async def test_a_chat_goes_through_the_template_and_may_fill_the_context():
    engine = ScriptedEngine()
    await read(await make_gateway(engine).chat(MODEL, HELLO, SamplingFields()))
    (request,) = engine.requests
    assert list(request.prompt_token_ids) == tokenizer().render_chat(HELLO)
    assert request.max_tokens == MAX_MODEL_LEN - len(request.prompt_token_ids)


@on_event_loop
async def test_a_long_text_is_tokenized_beside_the_streams_and_a_short_one_at_once(monkeypatch):
    gateway = make_gateway(ScriptedEngine())
    threads = []

    def noted(_self, text):
        threads.append(threading.get_ident())
        return [5]

    monkeypatch.setattr(type(gateway.tokenizer), "encode", noted)
    monkeypatch.setattr(type(gateway.tokenizer), "render_chat", noted)
    for text in ("a" * 1000, "a" * 1001):
        await read(await gateway.complete(MODEL, text, SamplingFields()))
    for messages in (
        [ChatMessage("user", "a" * 900)],
        [ChatMessage("user", "a" * 1000)],
        [ChatMessage("user", "")] * 99,
    ):
        await read(await gateway.chat(MODEL, messages, SamplingFields()))
    assert [thread == threading.get_ident() for thread in threads] == [True, False, True, False, False]


@on_event_loop
async def test_without_a_seed_each_request_draws_its_own():
    engine = ScriptedEngine()
    gateway = make_gateway(engine)
    for _ in range(3):
        await read(await gateway.complete(MODEL, "x", SamplingFields()))
    assert len({request.sampling.seed for request in engine.requests}) == 3
    assert len({request.request_id for request in engine.requests}) == 3


@pytest.mark.parametrize(
    ("prompt", "fields", "message"),
    [
        ("", SamplingFields(temperature=3.0), "temperature"),
        ([], SamplingFields(), "the prompt must hold at least one token"),
        ([1] * MAX_MODEL_LEN, SamplingFields(), "must leave room for one token in a context of 128 tokens, got 128"),
        ("word " * 200, SamplingFields(), "must leave room for one token"),
        ([1, 4096], SamplingFields(), r"token_ids\[1\] must be 0 to 4095, got 4096"),
        ([1], SamplingFields(max_tokens=MAX_MODEL_LEN), r"got 1 \+ 128"),
    ],
)
@on_event_loop
async def test_a_refused_request_never_reaches_the_engine_and_holds_no_place(prompt, fields, message):
    engine = ScriptedEngine()
    gateway = make_gateway(engine)
    with pytest.raises(InvalidRequestError, match=message):
        await gateway.complete(MODEL, prompt, fields)
    assert engine.requests == []
    assert gateway.num_running == 0


@on_event_loop
async def test_tokenize_and_detokenize_undo_each_other():
    gateway = make_gateway(ScriptedEngine())
    ids = await gateway.tokenize("", "Whales — 鯨")
    assert ids == tokenizer().encode("Whales — 鯨")
    assert gateway.detokenize(MODEL, ids) == "Whales — 鯨"


@on_event_loop
async def test_closing_the_consumer_closes_the_engines_stream_at_once(caplog):
    caplog.set_level(logging.INFO, "deploy.gateway")
    engine = ScriptedEngine(holds=True)
    gateway = make_gateway(engine)
    generation = await gateway.complete(MODEL, "x", SamplingFields())
    await anext(generation)
    assert engine.num_open == 1
    await generation.aclose()
    assert (engine.num_open, gateway.num_running) == (0, 0)
    assert endings(caplog) == ["left by the client"]


@on_event_loop
async def test_cancelling_the_task_that_waits_for_a_token_closes_the_engines_stream():
    engine = ScriptedEngine(holds=True)
    gateway = make_gateway(engine)
    reading = asyncio.ensure_future(read(await gateway.complete(MODEL, "x", SamplingFields())))
    await engine.opened.wait()
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert (engine.num_open, gateway.num_running) == (0, 0)


@on_event_loop
async def test_past_the_limit_a_request_is_refused_with_a_retry_delay_until_another_ends():
    gateway = make_gateway(ScriptedEngine(holds=True), max_requests=2)
    # Accepted is enough to hold a place: nobody has read from them yet.
    first, second = [await gateway.complete(MODEL, "x", SamplingFields()) for _ in range(2)]
    with pytest.raises(OverloadedError, match="takes 2 requests at once") as refusal:
        await gateway.chat(MODEL, HELLO, SamplingFields())
    assert refusal.value.retry_after_s > 0
    await first.aclose()
    third = await gateway.chat(MODEL, HELLO, SamplingFields())
    await second.aclose()
    await third.aclose()
    assert gateway.num_running == 0


@on_event_loop
async def test_requests_that_come_at_once_do_not_pass_the_limit_together():
    gateway = make_gateway(ScriptedEngine(), max_requests=2)
    accepted = await asyncio.gather(
        *(gateway.complete(MODEL, "x", SamplingFields()) for _ in range(5)), return_exceptions=True
    )
    refused = [entry for entry in accepted if isinstance(entry, OverloadedError)]
    assert len(refused) == 3
    for entry in accepted:
        if entry not in refused:
            await entry.aclose()
    assert gateway.num_running == 0


ENDS = {
    "finished": (ScriptedEngine, SamplingFields(), None, "length"),
    "stopped": (lambda: ScriptedEngine(steps_of("a END b")), SamplingFields(stop=("END",)), None, "stop"),
    "lost": (lambda: ScriptedEngine(error=UnavailableError("lost")), SamplingFields(), UnavailableError, "Unavailable"),
    "broken": (lambda: ScriptedEngine(error=ValueError("bug")), SamplingFields(), ValueError, "ValueError"),
    "failed": (
        lambda: ScriptedEngine(finish_reason=FinishReason.ERROR),
        SamplingFields(),
        FailedRequestError,
        "FailedRequest",
    ),
    "late": (lambda: ScriptedEngine(holds=True), SamplingFields(), DeadlineError, "Deadline"),
}


@pytest.mark.parametrize("end", ENDS)
@on_event_loop
async def test_every_end_is_told_once_and_gives_the_place_back(end, caplog):
    caplog.set_level(logging.INFO, "deploy.gateway")
    make_engine, fields, error, ending = ENDS[end]
    engine = make_engine()
    gateway = make_gateway(engine, max_requests=1, timeout_s=0.1 if end == "late" else 20.0)
    generation = await gateway.complete(MODEL, "x", fields)
    if error is None:
        await read(generation)
    else:
        with pytest.raises(error):
            await read(generation)
    await generation.aclose()
    assert [told.removesuffix("Error") for told in endings(caplog)] == [ending.removesuffix("Error")]
    assert (engine.num_open, gateway.num_running) == (0, 0)
    again = await gateway.complete(MODEL, "x", SamplingFields())
    await again.aclose()


@on_event_loop
async def test_the_log_tells_the_tokens_of_a_request(caplog):
    caplog.set_level(logging.INFO, "deploy.gateway")
    engine = ScriptedEngine(steps_of("Yes."), num_cached=1)
    generation = await make_gateway(engine).complete(MODEL, [5, 6], SamplingFields())
    await read(generation)
    (fields,) = [record.fields for record in caplog.records if record.getMessage() == "request ended"]
    assert fields == {
        "request_id": generation.id,
        "x_request_id": generation.id,
        "ending": "length",
        "prompt_tokens": 2,
        "completion_tokens": len(tokens_of("Yes.")),
        "cached_tokens": 1,
    }


@on_event_loop
async def test_draining_refuses_new_requests_and_waits_for_the_accepted_ones():
    gateway = make_gateway(ScriptedEngine())
    generation = await gateway.complete(MODEL, "x", SamplingFields())
    draining = asyncio.ensure_future(gateway.drain())
    await asyncio.sleep(0)
    assert not gateway.serving
    with pytest.raises(UnavailableError, match="draining"):
        await gateway.complete(MODEL, "x", SamplingFields())
    assert not draining.done()
    events = await read(generation)
    assert events[-1].finish_reason is FinishReason.LENGTH
    await draining


@on_event_loop
async def test_draining_an_idle_gateway_is_done_at_once():
    await make_gateway(ScriptedEngine()).drain()
