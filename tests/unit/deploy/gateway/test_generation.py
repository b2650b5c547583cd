"""From the engine's outputs to events: text, tokens, usage, the reason and the one end."""

from contextlib import aclosing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.request import FinishReason
from deploy.gateway.generation import Usage
from deploy.gateway.validation import SamplingFields
from model_shards.errors import DeadlineError, FailedRequestError, UnavailableError
from tests.scripted_engine import MODEL, ScriptedEngine, make_gateway, on_event_loop, steps_of, tokenizer, tokens_of

SENTENCE = "Die Wale sind groß — très grands, 大きい. END of it"


async def events_of(engine, timeout_s=20.0, **fields):
    gateway = make_gateway(engine, timeout_s=timeout_s)
    generation = await gateway.complete(MODEL, [5, 6, 7], SamplingFields(**fields))
    async with aclosing(generation):
        events = [event async for event in generation]
    assert (engine.num_open, gateway.num_running) == (0, 0)
    return events


def text_of(events):
    return "".join(event.text for event in events)


@on_event_loop
async def test_an_answer_has_the_text_and_tokens_of_the_engine_and_counts_them():
    events = await events_of(ScriptedEngine(steps_of(SENTENCE)))
    tokens = tokens_of(SENTENCE)
    assert text_of(events) == SENTENCE
    assert [token for event in events for token in event.token_ids] == tokens
    assert events[-1].finish_reason is FinishReason.LENGTH
    assert events[-1].usage == Usage(3, len(tokens))
    assert events[-1].usage.total_tokens == 3 + len(tokens)
    assert all(event.finish_reason is None and event.usage is None for event in events[:-1])


@on_event_loop
async def test_no_event_splits_a_character():
    events = await events_of(ScriptedEngine(steps_of("大きい鯨 🐋")))
    assert all("\ufffd" not in event.text for event in events)


@on_event_loop
async def test_an_end_of_sequence_token_counts_and_has_no_text():
    eos = tokenizer().eos_token_ids[0]
    events = await events_of(ScriptedEngine([*steps_of("Yes."), (eos,)], FinishReason.STOP))
    assert text_of(events) == "Yes."
    assert events[-1].finish_reason is FinishReason.STOP
    assert events[-1].usage.completion_tokens == len(tokens_of("Yes.")) + 1


@on_event_loop
async def test_a_stop_string_ends_the_answer_before_it_and_the_engines_stream_early():
    engine = ScriptedEngine(steps_of(SENTENCE), holds=True, num_cached=1)
    events = await events_of(engine, stop=("never", "END"))
    assert events[-1].usage is not None
    assert events[-1].usage.cached_tokens == 1
    assert text_of(events) == SENTENCE[: SENTENCE.index("END")]
    assert events[-1].finish_reason is FinishReason.STOP
    assert engine.num_steps < len(engine.steps)


@on_event_loop
async def test_the_engines_stream_is_closed_when_the_last_event_comes():
    engine = ScriptedEngine(steps_of("a STOP b"))
    gateway = make_gateway(engine)
    generation = await gateway.complete(MODEL, "x", SamplingFields(stop=("STOP",)))
    async for event in generation:
        if event.finish_reason is not None:
            assert (engine.num_open, gateway.num_running) == (0, 0)
    assert engine.closed.is_set()
    await generation.aclose()


@on_event_loop
async def test_text_held_back_for_a_stop_string_comes_with_the_end():
    assert text_of(await events_of(ScriptedEngine(steps_of("to be EN")), stop=("END",))) == "to be EN"


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1), st.sampled_from([(), ("END",), (" of", "nd"), ("大き",)]))
def test_the_answer_does_not_depend_on_how_tokens_came_together(sizes, stop):
    tokens = tokens_of(SENTENCE)
    steps, start = [], 0
    while start < len(tokens):
        size = sizes[len(steps) % len(sizes)]
        steps.append(tuple(tokens[start : start + size]))
        start += size

    @on_event_loop
    async def compare():
        one_by_one = await events_of(ScriptedEngine(steps_of(SENTENCE), top=()), stop=stop)
        together = await events_of(ScriptedEngine(steps, top=()), stop=stop)
        assert text_of(together) == text_of(one_by_one)
        assert together[-1].usage == one_by_one[-1].usage
        assert together[-1].finish_reason == one_by_one[-1].finish_reason
        assert sum(len(event.token_ids) for event in together) == together[-1].usage.completion_tokens
        assert all(len(event.logprobs) == len(event.token_ids) for event in together)

    compare()


@on_event_loop
async def test_a_request_out_of_time_fails_and_closes_the_engines_stream():
    engine = ScriptedEngine(holds=True)
    with pytest.raises(DeadlineError, match=r"request cmpl-\w+ did not finish within 0.05 s"):
        await events_of(engine, timeout_s=0.05)
    assert engine.num_open == 0
    assert engine.closed.is_set()


@on_event_loop
async def test_a_deadline_that_has_passed_counts_even_when_an_output_is_ready():
    engine = ScriptedEngine()
    with pytest.raises(DeadlineError):
        await events_of(engine, timeout_s=0.0)
    assert engine.num_steps == 0


@pytest.mark.parametrize("error", [UnavailableError("a rank was lost"), TimeoutError("the engine's own"), ValueError()])
@on_event_loop
async def test_what_the_engine_raises_midway_comes_through_unchanged(error):
    engine = ScriptedEngine(error=error)
    with pytest.raises(type(error)) as raised:
        await events_of(engine)
    assert raised.value is error
    assert engine.num_steps > 1
    assert engine.num_open == 0


@on_event_loop
async def test_an_error_output_is_unavailable_with_its_reason():
    with pytest.raises(FailedRequestError, match="the script says so"):
        await events_of(ScriptedEngine(finish_reason=FinishReason.ERROR))


@on_event_loop
async def test_a_stream_that_just_ends_is_a_lost_request_and_not_an_answer():
    with pytest.raises(UnavailableError, match="the engine lost request"):
        await events_of(ScriptedEngine(finish_reason=None))


@on_event_loop
async def test_log_probabilities_come_with_their_tokens():
    events = await events_of(ScriptedEngine(top=((1, -0.5), (2, -1.5))), logprobs=2)
    assert all(event.logprobs[0].top == ((1, -0.5), (2, -1.5)) for event in events)
