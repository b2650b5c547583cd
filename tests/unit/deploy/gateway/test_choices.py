"""Several choices of one request: one stream, one usage, one end; each choice as it would be alone."""

import asyncio
import logging
from contextlib import aclosing

import pytest

from cluster.request import FinishReason
from deploy.gateway.choices import choice_seed
from deploy.gateway.generation import Generation, Usage
from deploy.gateway.validation import SamplingFields
from deploy.text.messages import ChatMessage
from model_shards.errors import DeadlineError, InvalidRequestError, OverloadedError, UnavailableError
from tests.scripted_engine import MODEL, ScriptedEngine, make_gateway, on_event_loop, steps_of, tokenizer, tokens_of

HELLO = [ChatMessage("user", "Hello")]
TEXTS = ["Whales are large.", "Yes.", "大きい鯨 🐋"]


class EngineOfChoices:
    """Answers each choice, by its number, from a script of its own."""

    def __init__(self, *scripts):
        self.scripts = scripts
        self.requests = []

    def generate(self, request):
        self.requests.append(request)
        return self.scripts[int(request.request_id.rpartition("-")[2])].generate(request)

    @property
    def num_open(self):
        return sum(script.num_open for script in self.scripts)


def engine_of(*texts):
    return EngineOfChoices(*(ScriptedEngine(steps_of(text)) for text in texts))


async def read(accepted):
    async with aclosing(accepted):
        return [event async for event in accepted]


def of_choice(events, index):
    return [event for event in events if event.index == index]


def endings(caplog):
    return sorted(record.fields["ending"] for record in caplog.records if record.getMessage() == "request ended")


@on_event_loop
async def test_each_choice_has_its_own_text_and_reason_and_the_last_event_alone_the_usage_of_all():
    scripts = [ScriptedEngine(steps_of(text)) for text in TEXTS]
    scripts[1].finish_reason = FinishReason.STOP
    engine = EngineOfChoices(*scripts)
    gateway = make_gateway(engine)
    events = await read(await gateway.chat(MODEL, HELLO, SamplingFields(n=3)))
    for index, text in enumerate(TEXTS):
        choice = of_choice(events, index)
        assert "".join(event.text for event in choice) == text
        assert [token for event in choice for token in event.token_ids] == tokens_of(text)
        reason = FinishReason.STOP if index == 1 else FinishReason.LENGTH
        assert [event.finish_reason for event in choice] == [None] * (len(choice) - 1) + [reason]
    assert all(event.usage is None for event in events[:-1])
    prompt_tokens = len(tokenizer().render_chat(HELLO))
    assert events[-1].usage == Usage(prompt_tokens, sum(len(tokens_of(text)) for text in TEXTS))
    assert (engine.num_open, gateway.num_running) == (0, 0)


@on_event_loop
async def test_of_each_prompt_what_all_its_choices_found_in_the_cache_counts():
    scripts = [ScriptedEngine(steps_of("x"), num_cached=count) for count in (2, 0, 1, 2)]
    gateway = make_gateway(EngineOfChoices(*scripts))
    events = await read(await gateway.complete_all(MODEL, [[5, 6, 7], [8, 9]], SamplingFields(n=2)))
    assert events[-1].usage == Usage(5, 4 * len(tokens_of("x")), 0 + 1)


@on_event_loop
async def test_choices_come_as_they_are_generated_and_not_one_after_the_other():
    accepted = await make_gateway(engine_of(*TEXTS)).complete(MODEL, "x", SamplingFields(n=3))
    first = [(await anext(accepted)).index for _ in range(3)]
    await accepted.aclose()
    assert sorted(first) == [0, 1, 2]


@on_event_loop
async def test_prompts_have_their_choices_in_their_order_and_count_once_each():
    engine = ScriptedEngine(steps_of("Yes."))
    gateway = make_gateway(engine, max_requests=6)
    events = await read(await gateway.complete_all(MODEL, [[5, 6], "Hello", [7]], SamplingFields(n=2)))
    by_number = sorted(engine.requests, key=lambda request: int(request.request_id.rpartition("-")[2]))
    hello = tuple(tokenizer().encode("Hello"))
    assert [request.prompt_token_ids for request in by_number] == [(5, 6)] * 2 + [hello] * 2 + [(7,)] * 2
    assert {event.index for event in events} == set(range(6))
    assert events[-1].usage == Usage(2 + len(hello) + 1, 6 * len(tokens_of("Yes.")))
    assert len({request.request_id for request in engine.requests}) == 6


@on_event_loop
async def test_a_single_choice_is_a_plain_generation():
    gateway = make_gateway(ScriptedEngine())
    accepted = await gateway.complete_all(MODEL, [[5]], SamplingFields(n=1))
    assert isinstance(accepted, Generation)
    assert {event.index for event in await read(accepted)} == {0}


@pytest.mark.parametrize("seed", [0, 3, 2**64 - 1])
def test_a_choice_draws_from_the_clients_seed_or_from_one_derived_from_it(seed):
    seeds = [choice_seed(seed, choice) for choice in range(16)]
    assert seeds[0] == seed
    assert len(set(seeds)) == 16
    assert all(0 <= made < 2**64 for made in seeds)


def test_the_derived_seeds_never_change():
    assert [choice_seed(4, choice) for choice in range(3)] == [4, 1082169392890096180, 4609871963419492837]


@on_event_loop
async def test_with_a_seed_a_prompt_has_the_seeds_that_it_has_alone_and_without_one_all_differ():
    engine = ScriptedEngine()
    gateway = make_gateway(engine)
    await read(await gateway.complete_all(MODEL, [[5], [5]], SamplingFields(n=2, seed=9)))
    expected = [9, choice_seed(9, 1)]
    assert sorted(request.sampling.seed for request in engine.requests) == sorted(expected * 2)
    engine.requests.clear()
    await read(await gateway.complete_all(MODEL, [[5], [5]], SamplingFields(n=2)))
    assert len({request.sampling.seed for request in engine.requests}) == 4


@on_event_loop
async def test_leaving_closes_every_choice(caplog):
    caplog.set_level(logging.INFO, "deploy.gateway")
    engine = EngineOfChoices(*(ScriptedEngine(holds=True) for _ in range(3)))
    gateway = make_gateway(engine)
    accepted = await gateway.complete(MODEL, "x", SamplingFields(n=3))
    await anext(accepted)
    assert engine.num_open == 3
    await accepted.aclose()
    assert (engine.num_open, gateway.num_running) == (0, 0)
    assert endings(caplog) == ["left by the client"] * 3


@on_event_loop
async def test_cancelling_the_reader_closes_every_choice():
    engine = EngineOfChoices(*(ScriptedEngine(holds=True) for _ in range(2)))
    gateway = make_gateway(engine)
    reading = asyncio.ensure_future(read(await gateway.complete(MODEL, "x", SamplingFields(n=2))))
    await asyncio.gather(*(script.holding.wait() for script in engine.scripts))
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert (engine.num_open, gateway.num_running) == (0, 0)


@on_event_loop
async def test_closing_what_was_never_read_gives_every_place_back():
    engine = engine_of(*TEXTS)
    gateway = make_gateway(engine)
    accepted = await gateway.complete(MODEL, "x", SamplingFields(n=3))
    assert gateway.num_running == 3
    await accepted.aclose()
    assert (engine.requests, gateway.num_running) == ([], 0)


@on_event_loop
async def test_the_first_failure_ends_all_choices_once(caplog):
    caplog.set_level(logging.INFO, "deploy.gateway")
    error = UnavailableError("a rank was lost")
    scripts = [ScriptedEngine(holds=True), ScriptedEngine(steps_of("a b"), error=error), ScriptedEngine(steps_of("a"))]
    engine = EngineOfChoices(*scripts)
    gateway = make_gateway(engine)
    with pytest.raises(UnavailableError) as failure:
        await read(await gateway.complete(MODEL, "x", SamplingFields(n=3)))
    assert failure.value is error
    assert (engine.num_open, gateway.num_running) == (0, 0)
    assert endings(caplog) == ["UnavailableError", "another choice failed", "length"]


@on_event_loop
async def test_choices_that_fail_together_have_one_error_and_leave_none_behind():
    scripts = [ScriptedEngine(steps_of("a"), error=UnavailableError(str(index))) for index in range(3)]
    gateway = make_gateway(EngineOfChoices(*scripts))
    with pytest.raises(UnavailableError, match=r"^0$"):
        await read(await gateway.complete(MODEL, "x", SamplingFields(n=3)))
    assert gateway.num_running == 0


@on_event_loop
async def test_choices_out_of_time_fail_and_close_the_engines_streams():
    engine = EngineOfChoices(*(ScriptedEngine(holds=True) for _ in range(2)))
    with pytest.raises(DeadlineError):
        await read(await make_gateway(engine, timeout_s=0.05).complete(MODEL, "x", SamplingFields(n=2)))
    assert engine.num_open == 0


@on_event_loop
async def test_a_slow_reader_holds_every_choice_back():
    engine = engine_of("one two three four five", "one two three four five six")
    accepted = await make_gateway(engine).complete(MODEL, "x", SamplingFields(n=2))
    await anext(accepted)
    for _ in range(50):
        await asyncio.sleep(0)
    assert all(script.num_steps <= 3 for script in engine.scripts)
    await accepted.aclose()


@on_event_loop
async def test_each_choice_takes_a_place_and_a_request_gets_all_of_its_places_or_none():
    gateway = make_gateway(ScriptedEngine(), max_requests=4)
    three = await gateway.complete(MODEL, "x", SamplingFields(n=3))
    with pytest.raises(OverloadedError, match="takes 4 requests at once and has 3"):
        await gateway.complete(MODEL, "x", SamplingFields(n=2))
    one = await gateway.complete(MODEL, "x", SamplingFields())
    assert gateway.num_running == 4
    await read(three)
    assert gateway.num_running == 1
    await one.aclose()


@pytest.mark.parametrize(
    ("prompts", "n", "message"),
    [
        ([[5], [6], [7]], 2, "prompts x n must be at most 4, the requests at once, got 6"),
        ([[5]] * 5, 1, "prompts x n must be at most 4, the requests at once, got 5"),
        ([[5], [4096]], 1, r"prompt 1: token_ids\[0\] must be 0 to 4095, got 4096"),
        ([[5], []], 1, "prompt 1: the prompt must hold at least one token, got none"),
        (["a", "b" * 9000], 1, "prompt 1: prompt must be at most 8192 bytes"),
        ([], 1, "there must be at least one prompt, got none"),
    ],
)
@on_event_loop
async def test_one_bad_prompt_refuses_the_request_by_its_number(prompts, n, message):
    engine = ScriptedEngine()
    gateway = make_gateway(engine)
    with pytest.raises(InvalidRequestError, match=f"^{message}"):
        await gateway.complete_all(MODEL, prompts, SamplingFields(n=n))
    assert (engine.requests, gateway.num_running) == ([], 0)
