"""Steps that were prepared while the one before ran, against an engine that prepares none: the same, to the block."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.engine import Engine, SampledStep, ScheduledStep
from cluster.limits import EngineLimits
from cluster.prefill_budget import NOTHING_ELSEWHERE, Elsewhere
from cluster.request import FinishReason, GenerationRequest, StepOutput
from cluster.scheduler import ForeseenChunks, Scheduler
from model_shards.errors import EpochAbortedError
from model_shards.sampler import NO_TOKEN, SampledToken
from model_shards.sampling import SamplingParams
from tests.fakes import FAKE_VOCAB_SIZE, FakeModel, FakeRouted, fake_cache, fake_config

GREEDY = SamplingParams(temperature=0.0)
LIMITS = EngineLimits(
    max_model_len=64, max_num_seqs=4, max_num_batched_tokens=16, block_size=4, num_blocks=48, num_micro_batches=2
)


class InTurn(Engine):
    """Schedules every step when the one before it is done."""

    def schedule(self, elsewhere: Elsewhere = NOTHING_ELSEWHERE) -> ScheduledStep:
        self._prepared = None
        return super().schedule(elsewhere)


def make(kind: type[Engine], limits: EngineLimits = LIMITS) -> Engine:
    ticks = itertools.count()
    cache = fake_cache(limits.num_blocks, limits.block_size)
    return kind(fake_config(), FakeModel(), cache, limits, clock=lambda: float(next(ticks) % 7))


def run(engine: Engine, step: ScheduledStep, fails_at: int | None = None) -> SampledStep:
    return engine.run(step, [FakeRouted(fails_at if index == 0 else None) for index in range(len(step.micro_batches))])


def described(step: ScheduledStep) -> list[object]:
    """All that a step holds, tensors as lists, sequences as ids."""
    return [
        [(c.sequence.request.request_id, c.start, c.stop, c.is_decode, c.wants_logits) for c in step.chunks],
        [list(chunk.sequence.block_table) for chunk in step.chunks],
        [
            [value.tolist() if isinstance(value, torch.Tensor) else value for value in vars(batch).values()]
            for batch in step.micro_batches
        ],
        [sequence.request.request_id for sequence in step.sampled],
        (step.allowed_prefill, step.has_prefill),
    ]


@dataclass(frozen=True)
class Turn:
    """What happens around one step."""

    adds: int = 0
    cancels: tuple[int, ...] = ()  # requests, before the step
    cancels_under_way: tuple[int, ...] = ()
    end: str = "commit"  # or abandon, after it was run; abort, while it runs; idle, before
    fails: int | None = None  # which of the sampled tokens is lost: logits that are not finite
    elsewhere: Elsewhere = NOTHING_ELSEWHERE


@dataclass(frozen=True)
class Script:
    limits: EngineLimits
    requests: tuple[GenerationRequest, ...]
    turns: tuple[Turn, ...]


@st.composite
def scripts(draw: st.DrawFn) -> Script:
    max_num_seqs = draw(st.integers(1, 5))
    block_size = draw(st.integers(1, 4))
    num_blocks = draw(st.integers(6, 24))
    capacity = num_blocks * block_size
    limits = EngineLimits(
        max_model_len=capacity,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=draw(st.integers(max_num_seqs, 16)),
        block_size=block_size,
        num_blocks=num_blocks,
        num_micro_batches=draw(st.integers(1, 3)),
        choose_micro_batches=draw(st.booleans()),
        max_decode_slowdown=draw(st.none() | st.just(1.5)),
        prefix_cache=draw(st.booleans()),
    )
    token = st.integers(0, FAKE_VOCAB_SIZE - 1)
    common = draw(st.lists(token, min_size=6, max_size=6))
    requests = []
    for index in range(draw(st.integers(1, 8))):
        prompt_len = draw(st.integers(1, min(6, capacity - 1)))
        own = draw(st.integers(0, prompt_len))
        requests.append(
            GenerationRequest(
                f"r{index}",
                (*common[: prompt_len - own], *draw(st.lists(token, min_size=own, max_size=own))),
                max_tokens=draw(st.integers(1, min(24, capacity - prompt_len))),
                sampling=draw(
                    st.sampled_from([GREEDY, SamplingParams(1.0, seed=3), SamplingParams(0.8, frequency_penalty=0.5)])
                ),
                eos_token_ids=tuple(draw(st.lists(token, max_size=2))),
            )
        )
    some = st.lists(st.integers(0, 7), max_size=1).map(tuple)
    eventful = st.builds(
        Turn,
        adds=st.integers(0, 3),
        cancels=some,
        cancels_under_way=some,
        end=st.sampled_from(["commit", "commit", "commit", "abandon", "abort", "idle"]),
        fails=st.none() | st.integers(0, 4),
        elsewhere=st.builds(Elsewhere, st.none() | st.integers(0, 4), st.integers(0, 3), st.integers(0, 1)),
    )
    quiet = st.lists(st.just(Turn()), min_size=1, max_size=6)
    turns = draw(st.lists(st.one_of(eventful.map(lambda turn: [turn]), quiet), max_size=16))
    return Script(limits, tuple(requests), (Turn(adds=draw(st.integers(1, 7))), *itertools.chain(*turns)))


def in_both(engines: tuple[Engine, Engine], act: Callable[[Engine], object]) -> None:
    """Does the same with both; they give the same and stand alike."""
    ahead, in_turn = [act(engine) for engine in engines]
    assert ahead == in_turn
    for engine in engines:
        engine.check_integrity()
    assert engines[0].load() == engines[1].load()


def take_turn(engine: Engine, turn: Turn) -> tuple[list[object], list[StepOutput]]:
    """One step as `turn` says: what it held, and its outputs."""
    step = engine.schedule(turn.elsewhere)
    engine.check_integrity()
    held = described(step)
    for index in turn.cancels_under_way:
        engine.cancel(f"r{index}")
        engine.check_integrity()
    if turn.end == "idle" or not step.num_tokens:
        engine.abandon(step)
        return held, []
    if turn.end == "abort":
        with pytest.raises(EpochAbortedError):
            run(engine, step, fails_at=1)
        return held, engine.abort(step)
    sampled = run(engine, step)
    engine.check_integrity()
    if turn.end == "abandon":
        engine.abandon(step)
        return held, []
    if turn.fails is not None and turn.fails < len(sampled.tokens):
        tokens = list(sampled.tokens)
        tokens[turn.fails] = SampledToken(NO_TOKEN)
        sampled = replace(sampled, tokens=tuple(tokens))
    return held, engine.commit(step, sampled, turn.elsewhere)


@settings(deadline=None, max_examples=150)
@given(scripts())
def test_whatever_happens_the_steps_are_those_of_an_engine_that_prepares_none(script: Script) -> None:
    engines = make(Engine, script.limits), make(InTurn, script.limits)
    requests = iter(script.requests)
    to_the_end = itertools.repeat(Turn(adds=8), 400)
    for turn in itertools.chain(script.turns, to_the_end):
        for request in itertools.islice(requests, turn.adds):
            in_both(engines, lambda engine, request=request: engine.add(request))
        for index in turn.cancels:
            in_both(engines, lambda engine, index=index: engine.cancel(f"r{index}"))
        in_both(engines, lambda engine, turn=turn: take_turn(engine, turn))
        if turn.adds == 8 and not engines[0].has_work():
            break
    assert not engines[0].has_work()
    assert engines[0].load().num_free_blocks == script.limits.num_blocks


def request_of(name: str, prompt_len: int = 5, max_tokens: int = 40, **changes: object) -> GenerationRequest:
    prompt = tuple((7 * i + 3 * len(name)) % FAKE_VOCAB_SIZE for i in range(prompt_len))
    return replace(GenerationRequest(name, prompt, max_tokens, GREEDY, ignore_eos=True), **changes)


class Takes:
    """What became of the prepared steps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.results: list[bool] = []
        take = Scheduler.take

        def noted(scheduler: Scheduler, foreseen: ForeseenChunks) -> bool:
            self.results.append(take(scheduler, foreseen))
            return self.results[-1]

        monkeypatch.setattr(Scheduler, "take", noted)

    def new(self) -> list[bool]:
        """Those since it was asked last."""
        results, self.results = self.results, []
        return results


@pytest.fixture
def takes(monkeypatch: pytest.MonkeyPatch) -> Takes:
    return Takes(monkeypatch)


def advance(engine: Engine, **turn: object) -> list[StepOutput]:
    _, outputs = take_turn(engine, Turn(**turn))
    engine.check_integrity()
    return outputs


def decoding(limits: EngineLimits = LIMITS, names: str = "abc", **changes: object) -> Engine:
    """An engine of which all sequences decode, with a step prepared."""
    engine = make(Engine, limits)
    for index, name in enumerate(names):
        engine.add(request_of(name * (index + 1), **changes))
    for _ in range(3):
        advance(engine)
    return engine


def test_while_all_decode_every_step_was_prepared(takes: Takes) -> None:
    engine = decoding()
    takes.new()
    for _ in range(20):
        advance(engine)
    assert takes.new() == [True] * 20


def test_the_end_of_a_sequence_by_its_length_is_foreseen(takes: Takes) -> None:
    engine = make(Engine)
    engine.add(request_of("a", max_tokens=4))
    engine.add(request_of("bb", max_tokens=7))
    ends = [[output.request_id for output in advance(engine) if output.finish_reason] for _ in range(7)]
    assert ends == [[], [], [], ["a"], [], [], ["bb"]]
    assert takes.new() == [True] * 6


def test_while_more_wait_than_may_run_steps_are_prepared(takes: Takes) -> None:
    engine = decoding(replace(LIMITS, max_num_seqs=2))
    takes.new()
    assert engine.load().num_waiting == 1
    advance(engine)
    engine.add(request_of("new"))
    advance(engine)
    assert takes.new() == [True, True]


@pytest.mark.parametrize(
    "happens",
    [
        pytest.param(lambda engine: engine.cancel("a"), id="cancelled"),
        pytest.param(lambda engine: engine.add(request_of("new")), id="added"),
        pytest.param(lambda engine: advance(engine, end="abandon"), id="abandoned"),
        pytest.param(lambda engine: advance(engine, end="abort"), id="aborted"),
        pytest.param(lambda engine: advance(engine, fails=1), id="not-finite"),
    ],
)
def test_a_prepared_step_is_dropped_when(happens: Callable[[Engine], object], takes: Takes) -> None:
    engine = decoding()
    happens(engine)
    takes.new()
    free = engine.load().num_free_blocks
    step = engine.schedule()
    assert takes.new() == [False]
    assert engine.load().num_free_blocks <= free
    engine.commit(step, run(engine, step))
    engine.check_integrity()


def test_a_sequence_that_ends_by_its_token_drops_the_step_and_takes_its_blocks_along(takes: Takes) -> None:
    free = make(Engine)
    free.add(request_of("a", max_tokens=30))
    tokens = [output.token_ids[0] for _ in range(30) for output in advance(free)]
    eos = next(token for index, token in enumerate(tokens) if index > 3 and token not in tokens[:index])
    engine = make(Engine)
    engine.add(request_of("a", eos_token_ids=(eos,), ignore_eos=False))
    engine.add(request_of("bb", max_tokens=41))
    takes.new()
    while not any(output.finish_reason is FinishReason.STOP for output in advance(engine)):
        pass
    before = takes.new()
    assert before == [True] * len(before)
    advance(engine)
    advance(engine)
    assert takes.new() == [False, True]


def test_another_number_of_micro_batches_keeps_the_step_and_cuts_it_anew(takes: Takes) -> None:
    engines = [make(kind, replace(LIMITS, choose_micro_batches=True)) for kind in (Engine, InTurn)]
    for engine in engines:
        for name in ("a", "bb", "ccc"):
            engine.add(request_of(name))
        advance(engine)
    counts = []
    for _ in range(6):
        steps = [engine.schedule() for engine in engines]
        assert described(steps[0]) == described(steps[1])
        counts.append(steps[0].num_filled)
        for engine, step in zip(engines, steps, strict=True):
            engine.commit(step, run(engine, step))
    assert set(counts) == {1, 2}
    assert takes.new() == [True] * 6


def test_no_block_is_taken_ahead_and_none_is_prepared_where_one_must_be_preempted(takes: Takes) -> None:
    # Two sequences of five tokens hold two blocks of four each; each needs a third for its ninth token, one is left.
    engine = decoding(replace(LIMITS, num_blocks=5, max_model_len=20), "ab", max_tokens=10)
    takes.new()
    assert engine.load().num_free_blocks == 1
    advance(engine)
    assert takes.new() == [True]
    advance(engine)
    assert (takes.new(), engine.load().num_preemptions) == ([], 1)
