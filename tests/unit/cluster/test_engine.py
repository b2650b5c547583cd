"""The engine against a slow reference that generates every request alone, without cache, batch or scheduler."""

import itertools
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.engine import Engine, SampledStep, ScheduledStep
from cluster.limits import EngineLimits
from cluster.request import FinishReason, GenerationRequest, StepOutput
from model_shards.errors import ConfigError, EpochAbortedError, InvalidRequestError
from model_shards.sampler import NO_TOKEN, SampledToken, SamplingRow, TokenStatistics, has_penalty, sample
from model_shards.sampling import SamplingParams
from tests.fakes import FAKE_NUM_LAYERS, FAKE_VOCAB_SIZE, FakeModel, FakeRouted, fake_cache, fake_config, fake_logits

GREEDY = SamplingParams(temperature=0.0)
LIMITS = EngineLimits(
    max_model_len=64, max_num_seqs=4, max_num_batched_tokens=8, block_size=4, num_blocks=32, num_micro_batches=1
)


def make_engine(limits: EngineLimits = LIMITS) -> Engine:
    # A clock without time: what is chosen by measurement is then a matter of the steps alone.
    ticks = itertools.count()
    cache = fake_cache(limits.num_blocks, limits.block_size)
    return Engine(fake_config(), FakeModel(), cache, limits, clock=lambda: float(next(ticks) % 7))


def run(engine: Engine, step: ScheduledStep, fails_at: int | None = None) -> SampledStep:
    routed = [FakeRouted(fails_at if index == 0 else None) for index in range(len(step.micro_batches))]
    sampled = engine.run(step, routed)
    for batch, experts in zip(step.micro_batches, routed, strict=True):
        assert experts.dispatched == [batch.num_tokens] * FAKE_NUM_LAYERS
    return sampled


def advance(engine: Engine) -> list[StepOutput]:
    step = engine.schedule()
    outputs = engine.commit(step, run(engine, step))
    engine.check_integrity()
    return outputs


def drain(engine: Engine, max_steps: int = 1000) -> dict[str, list[StepOutput]]:
    collected: dict[str, list[StepOutput]] = {}
    for _ in range(max_steps):
        if not engine.has_work():
            return collected
        for output in advance(engine):
            collected.setdefault(output.request_id, []).append(output)
    raise AssertionError("the engine did not finish")


def tokens_of(outputs: list[StepOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def generate_alone(request: GenerationRequest) -> tuple[list[int], FinishReason]:
    """The reference: the whole context again for every token."""
    output = list(request.output_token_ids)
    seed = request.sampling.seed or 0
    new: list[int] = []
    while True:
        context = [*request.prompt_token_ids, *output]
        statistics = None
        if has_penalty(request.sampling):
            statistics = TokenStatistics(FAKE_VOCAB_SIZE, request.prompt_token_ids, output, torch.device("cpu"))
        row = SamplingRow(request.sampling, seed, len(context), statistics)
        (token,) = sample(fake_logits(context)[None], [row])
        output.append(token.token_id)
        new.append(token.token_id)
        if token.token_id in request.eos_token_ids and not request.ignore_eos:
            return new, FinishReason.STOP
        if len(output) == request.max_tokens:
            return new, FinishReason.LENGTH


def check_against_reference(request: GenerationRequest, outputs: list[StepOutput]) -> None:
    tokens, reason = generate_alone(request)
    assert tokens_of(outputs) == tokens
    assert [output.finish_reason for output in outputs] == [None] * (len(outputs) - 1) + [reason]


@dataclass(frozen=True)
class Workload:
    limits: EngineLimits
    requests: tuple[GenerationRequest, ...]
    arrivals: tuple[int, ...]  # step before which each request comes
    abandons: frozenset[int]  # steps that are run and then abandoned
    aborts: frozenset[int]  # steps whose exchange fails
    cancels: tuple[tuple[int, int, bool], ...]  # (step, request, while the step is under way)


sampling_params = st.one_of(
    st.just(GREEDY),
    st.builds(
        SamplingParams,
        temperature=st.sampled_from([0.0, 0.7, 1.5]),
        top_p=st.sampled_from([1.0, 0.8]),
        top_k=st.sampled_from([0, 1, 5]),
        repetition_penalty=st.sampled_from([1.0, 1.3]),
        presence_penalty=st.sampled_from([0.0, 0.5]),
        frequency_penalty=st.sampled_from([0.0, 0.5]),
        seed=st.integers(0, 2**64 - 1),
    ),
)


@st.composite
def workloads(draw: st.DrawFn) -> Workload:
    block_size = draw(st.integers(1, 4))
    num_blocks = draw(st.integers(2, 10))
    capacity = num_blocks * block_size
    max_num_seqs = draw(st.integers(1, 5))
    limits = EngineLimits(
        max_model_len=capacity,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=draw(st.integers(max_num_seqs, 12)),
        block_size=block_size,
        num_blocks=num_blocks,
        num_micro_batches=draw(st.integers(1, 3)),
        choose_micro_batches=draw(st.booleans()),
        max_decode_slowdown=draw(st.none() | st.floats(1.1, 3.0)),
        prefix_cache=draw(st.booleans()),
    )
    token = st.integers(0, FAKE_VOCAB_SIZE - 1)
    common = draw(st.lists(token, min_size=12, max_size=12))
    requests = []
    for index in range(draw(st.integers(1, 6))):
        prompt_len = draw(st.integers(1, min(12, capacity - 1)))
        max_tokens = draw(st.integers(1, min(8, capacity - prompt_len)))
        own = draw(st.integers(0, prompt_len))  # the rest is the begin of all prompts
        request = GenerationRequest(
            request_id=f"r{index}",
            prompt_token_ids=(*common[: prompt_len - own], *draw(st.lists(token, min_size=own, max_size=own))),
            max_tokens=max_tokens,
            sampling=draw(sampling_params),
            eos_token_ids=tuple(draw(st.lists(token, max_size=3))),
            ignore_eos=draw(st.booleans()),
            output_token_ids=tuple(draw(st.lists(token, max_size=max_tokens - 1))),
        )
        if request.sampling.seed is None:
            request = replace(request, sampling=replace(request.sampling, seed=index))
        requests.append(request)
    steps = st.integers(0, 20)
    return Workload(
        limits,
        tuple(requests),
        tuple(draw(st.integers(0, 6)) for _ in requests),
        draw(st.frozensets(steps, max_size=4)),
        draw(st.frozensets(steps, max_size=4)),
        tuple(draw(st.lists(st.tuples(steps, st.integers(0, 5), st.booleans()), max_size=2))),
    )


def writes(step: ScheduledStep, block_size: int) -> dict[str, dict[int, tuple[int, int]]]:
    """Request id -> position -> (token, slot) of a step."""
    return {
        chunk.sequence.request.request_id: {
            position: (
                chunk.sequence.token_ids[position],
                chunk.sequence.block_table[position // block_size] * block_size + position % block_size,
            )
            for position in range(chunk.start, chunk.stop)
        }
        for chunk in step.chunks
    }


@settings(deadline=None, max_examples=150)
@given(workloads())
def test_every_request_gets_the_tokens_it_would_get_alone(workload: Workload) -> None:
    engine = make_engine(workload.limits)
    collected: dict[str, list[StepOutput]] = {request.request_id: [] for request in workload.requests}
    cancelled: set[str] = set()
    added: list[str] = []
    # A loose bound: every request alone, computed again after each of its tokens, plus what was thrown away.
    bound = 40 + sum((len(r.prompt_token_ids) + r.max_tokens) * (r.max_tokens + 1) for r in workload.requests)
    for number in range(bound):
        for request, arrival in zip(workload.requests, workload.arrivals, strict=True):
            if arrival == number and request.request_id not in cancelled:
                engine.add(request)
                added.append(request.request_id)
        due = [(f"r{index}", under_way) for at, index, under_way in workload.cancels if at == number]
        for request_id, under_way in due:
            if not under_way:
                engine.cancel(request_id)
                cancelled.add(request_id)
        engine.check_integrity()
        step = engine.schedule()
        engine.check_integrity()
        assert len(step.micro_batches) == workload.limits.num_micro_batches
        assert sum(batch.num_tokens for batch in step.micro_batches) == step.num_tokens
        assert step.num_tokens <= workload.limits.max_num_batched_tokens
        # The oldest request that is not done is in every step but those that measure decodes alone: nothing can starve.
        oldest = next((r for r in added if r not in cancelled and not _ended(collected[r])), None)
        measures = workload.limits.max_decode_slowdown is not None and all(chunk.is_decode for chunk in step.chunks)
        assert oldest is None or measures or oldest in writes(step, workload.limits.block_size)
        for request_id, under_way in due:
            if under_way:
                engine.cancel(request_id)
                cancelled.add(request_id)
        if number in workload.aborts and step.num_tokens:
            with pytest.raises(EpochAbortedError):
                run(engine, step, fails_at=1)
            engine.abandon(step)
        elif number in workload.abandons:
            run(engine, step)
            before = writes(step, workload.limits.block_size)
            engine.abandon(step)
            again = engine.schedule()
            after = writes(again, workload.limits.block_size)
            if before.keys().isdisjoint(cancelled):
                assert after == before
            for request_id in before.keys() - cancelled:
                for position, write in before[request_id].items():
                    assert after[request_id][position] == write
            engine.abandon(again)
        else:
            for output in engine.commit(step, run(engine, step)):
                assert output.request_id not in cancelled
                collected[output.request_id].append(output)
        engine.check_integrity()
        if not engine.has_work() and number > 6:
            break
    assert not engine.has_work()
    assert engine.load().num_free_blocks == workload.limits.num_blocks
    for request in workload.requests:
        if request.request_id not in cancelled:
            check_against_reference(request, collected[request.request_id])


def _ended(outputs: list[StepOutput]) -> bool:
    return bool(outputs) and outputs[-1].finish_reason is not None


def request_of(request_id: str, prompt_len: int, max_tokens: int, **changes: object) -> GenerationRequest:
    prompt = tuple((7 * i + len(request_id)) % FAKE_VOCAB_SIZE for i in range(prompt_len))
    return replace(GenerationRequest(request_id, prompt, max_tokens, GREEDY), **changes)


def test_a_tiny_cache_preempts_and_changes_no_token() -> None:
    engine = make_engine(replace(LIMITS, num_blocks=6, max_model_len=24))
    requests = [request_of(f"{'x' * i}", 6, 12) for i in range(1, 5)]
    for request in requests:
        engine.add(request)
    collected = drain(engine)
    assert engine.load().num_preemptions > 0
    for request in requests:
        check_against_reference(request, collected[request.request_id])


def count_tokens(engine: Engine, request: GenerationRequest) -> int:
    """Tokens of all steps until the request, alone in the engine, has its tokens; they are the reference's."""
    engine.add(request)
    num_tokens, outputs = 0, []
    while engine.has_work():
        step = engine.schedule()
        num_tokens += step.num_tokens
        outputs += engine.commit(step, run(engine, step))
        engine.check_integrity()
    check_against_reference(request, outputs)
    return num_tokens


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_a_repeated_system_prompt_of_1000_tokens_costs_its_last_partial_block(prefix_cache: bool) -> None:
    limits = replace(LIMITS, max_model_len=2048, max_num_batched_tokens=512, block_size=16, num_blocks=200)
    engine = make_engine(replace(limits, prefix_cache=prefix_cache))
    system = tuple((7 * i * i + 3) % FAKE_VOCAB_SIZE for i in range(1000))
    first = count_tokens(engine, GenerationRequest("a", (*system, 1, 2, 3), 1, GREEDY))
    assert first == 1003
    for question in [(1, 2, 3), (4, 5, 6, 7), (8,)]:
        again = count_tokens(engine, GenerationRequest("b", (*system, *question), 1, GREEDY))
        assert again - len(question) == (1000 % 16 if prefix_cache else 1000)
        assert not prefix_cache or again - len(question) < 0.05 * 1000
    assert engine.load().num_cached_tokens == (3 * 992 if prefix_cache else 0)
    assert engine.load().num_free_blocks == 200


def test_a_conversation_finds_its_own_answers_in_the_cache() -> None:
    engine = make_engine()
    first = request_of("a", 9, 8)
    engine.add(first)
    answer = tokens_of(drain(engine)["a"])
    prompt = (*first.prompt_token_ids, *answer, 1, 2)
    # 19 tokens; of the 17 before, the last one was sampled but never computed: 4 blocks of 4 are known.
    assert count_tokens(engine, GenerationRequest("b", prompt, 1, GREEDY)) == 19 - 16


def test_penalties_seed_and_log_probabilities_do_not_depend_on_what_was_in_the_cache() -> None:
    sampling = SamplingParams(
        temperature=1.2,
        top_k=9,
        seed=3,
        repetition_penalty=1.4,
        presence_penalty=0.6,
        frequency_penalty=0.9,
        logprobs=3,
    )
    request = request_of("a", 17, 12, sampling=sampling)
    engine = make_engine()
    answers = []
    for _ in range(2):
        engine.add(request)
        answers.append(drain(engine)["a"])
    assert [replace(output, num_cached_tokens=16) for output in answers[0]] == answers[1]
    assert all(output.num_cached_tokens == 0 for output in answers[0])
    assert engine.load().num_cached_tokens == 16
    check_against_reference(request, answers[0])


def test_what_was_computed_with_logits_that_are_not_finite_is_never_shared() -> None:
    engine = make_engine()
    request = request_of("a", 11, 4)
    for number in range(2):
        # A chunk of the prompt is committed before anything is noticed.
        for request_id in ("a", "b"):
            engine.add(replace(request, request_id=request_id))
        step = engine.schedule()
        assert [(chunk.start, chunk.stop) for chunk in step.chunks] == [(0, 8)]
        engine.commit(step, run(engine, step))
        step = engine.schedule()
        if number == 0:
            engine.cancel("b")
        assert [(chunk.start, chunk.stop) for chunk in step.chunks] == [(8, 11), (8, 11)]
        lost = SampledStep(tuple(SampledToken(NO_TOKEN, None, ()) for _ in step.sampled), 1.0)
        outputs = engine.commit(step, lost)
        assert {output.finish_reason for output in outputs} == {FinishReason.ERROR}
        engine.check_integrity()
    assert count_tokens(engine, request) == 11 + 3


def run_with_parts(engine: Engine, steps: int, waited_s: float, experts_s: float) -> list[int]:
    """Numbers of micro-batches of steps of 1 s; what experts took is told when the next step is scheduled already."""
    counts, told = [], None
    for _ in range(steps):
        step = engine.schedule()
        engine.experts_took(told)
        counts.append(sum(batch.num_tokens > 0 for batch in step.micro_batches))
        engine.commit(step, replace(run(engine, step), seconds=1.0, waited_s=waited_s))
        told = experts_s
    engine.experts_took(told)
    return counts


@pytest.mark.parametrize(
    ("waited_s", "experts_s", "tried"), [(0.02, 0.01, {1}), (0.99, 0.98, {1}), (0.5, 0.4, {1, 2, 3})]
)
def test_micro_batches_are_tried_where_the_parts_of_steps_promise_something(waited_s, experts_s, tried) -> None:
    engine = make_engine(replace(LIMITS, num_micro_batches=3, choose_micro_batches=True))
    for name in ("a", "bb", "ccc", "dddd"):
        engine.add(request_of(name, 1, 40))
    advance(engine)  # their prompts, which are of another kind
    assert set(run_with_parts(engine, 20, waited_s, experts_s)) == tried
    times = engine.load().times
    assert times.num_steps == 20  # of that with the prompts nobody told
    assert (times.step_s, times.waited_s, times.experts_s) == pytest.approx((20.0, 20 * waited_s, 20 * experts_s))


def test_a_prompt_longer_than_the_budget_is_cut_into_chunks_beside_decodes() -> None:
    engine = make_engine()
    engine.add(request_of("a", 2, 10))
    assert [output.request_id for output in advance(engine)] == ["a"]
    engine.add(request_of("bb", 20, 2))
    step = engine.schedule()
    assert [(chunk.is_decode, chunk.num_tokens) for chunk in step.chunks] == [(True, 1), (False, 7)]
    engine.commit(step, run(engine, step))
    assert [len(outputs) for outputs in (advance(engine), advance(engine))] == [1, 2]


def test_an_idle_engine_still_takes_part_in_every_exchange() -> None:
    engine = make_engine(replace(LIMITS, num_micro_batches=3))
    step = engine.schedule()
    assert step.num_tokens == 0
    assert [batch.num_tokens for batch in step.micro_batches] == [0, 0, 0]
    assert engine.commit(step, run(engine, step)) == []


def test_eos_stops_and_is_among_the_tokens_unless_it_is_ignored() -> None:
    free, _ = generate_alone(request_of("a", 3, 8))
    eos = free[2]
    first = free.index(eos)
    for ignore, expected in ((False, first + 1), (True, 8)):
        engine = make_engine()
        engine.add(request_of("a", 3, 8, eos_token_ids=(eos,), ignore_eos=ignore))
        outputs = drain(engine)["a"]
        assert tokens_of(outputs) == free[:expected]
        assert outputs[-1].finish_reason is (FinishReason.LENGTH if ignore else FinishReason.STOP)


def test_a_replayed_request_goes_on_where_it_was() -> None:
    sampling = SamplingParams(temperature=1.0, seed=5, frequency_penalty=0.7, repetition_penalty=1.2)
    whole = request_of("a", 5, 9, sampling=sampling)
    tokens, _ = generate_alone(whole)
    for done in range(1, 9):
        engine = make_engine()
        engine.add(replace(whole, output_token_ids=tuple(tokens[:done])))
        assert tokens_of(drain(engine)["a"]) == tokens[done:]


def test_cancel_frees_blocks_at_once_or_when_the_step_under_way_ends() -> None:
    engine = make_engine()
    engine.add(request_of("a", 5, 9))
    engine.add(request_of("bb", 5, 9))
    advance(engine)
    step = engine.schedule()
    held = engine.load().num_free_blocks
    engine.cancel("a")
    assert engine.load().num_free_blocks == held
    assert {output.request_id for output in engine.commit(step, run(engine, step))} <= {"bb"}
    assert engine.load().num_free_blocks > held
    engine.cancel("bb")
    engine.cancel("unknown")
    assert engine.load().num_free_blocks == LIMITS.num_blocks
    assert not engine.has_work()
    engine.check_integrity()


def test_a_cancelled_id_may_be_used_again_while_its_step_is_under_way() -> None:
    engine = make_engine()
    engine.add(request_of("a", 3, 4))
    step = engine.schedule()
    engine.cancel("a")
    engine.add(request_of("a", 6, 5))
    assert engine.commit(step, run(engine, step)) == []
    check_against_reference(request_of("a", 6, 5), drain(engine)["a"])


def test_logprobs_come_with_each_token() -> None:
    engine = make_engine()
    request = request_of("a", 3, 2, sampling=replace(GREEDY, logprobs=2))
    engine.add(request)
    first = drain(engine)["a"][0]
    expected = fake_logits(request.prompt_token_ids).log_softmax(-1)
    assert first.logprobs[0].logprob == pytest.approx(float(expected.max()))
    assert first.logprobs[0].top[0][0] == first.token_ids[0]
    assert len(first.logprobs[0].top) == 2


@pytest.mark.parametrize(
    ("limits", "request_", "numbers"),
    [
        (LIMITS, request_of("a", 64, 1), ["64 tokens", "64"]),
        (LIMITS, request_of("a", 60, 5), ["60", "5", "65", "64"]),
        (replace(LIMITS, num_blocks=4), request_of("a", 15, 2), ["15", "2", "5 cache blocks", "are 4"]),
        (LIMITS, request_of("a", 3, 0), ["max_tokens", "0"]),
        (LIMITS, request_of("a", 0, 3), ["prompt", "0"]),
        (LIMITS, request_of("a", 1, 3, prompt_token_ids=(1, 31)), ["30", "31"]),
        (LIMITS, request_of("a", 1, 3, prompt_token_ids=(-1, 3)), ["30", "-1"]),
        (LIMITS, request_of("a", 1, 2, output_token_ids=(1, 2)), ["max_tokens is 2", "2 are generated"]),
    ],
)
def test_a_request_that_can_never_fit_is_refused_with_the_numbers(
    limits: EngineLimits, request_: GenerationRequest, numbers: list[str]
) -> None:
    engine = make_engine(limits)
    with pytest.raises(InvalidRequestError) as refused:
        engine.add(request_)
    assert all(number in str(refused.value) for number in numbers)
    assert not engine.has_work()


def test_a_request_that_just_fits_is_generated() -> None:
    engine = make_engine(replace(LIMITS, num_blocks=4, max_model_len=16))
    engine.add(request_of("a", 10, 6))
    check_against_reference(request_of("a", 10, 6), drain(engine)["a"])


def test_a_running_request_id_is_refused() -> None:
    engine = make_engine()
    engine.add(request_of("a", 2, 2))
    with pytest.raises(InvalidRequestError, match="already running"):
        engine.add(request_of("a", 2, 2))


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"block_size": 0}, "block_size must be at least 1, got 0"),
        ({"max_decode_slowdown": 1.0}, "max_decode_slowdown must be above 1 and finite, got 1.0"),
        ({"max_decode_slowdown": float("inf")}, "max_decode_slowdown must be above 1 and finite, got inf"),
        ({"num_micro_batches": 4}, "num_micro_batches must be 1 to 3, got 4"),
        ({"max_num_seqs": 9}, "max_num_seqs must not exceed max_num_batched_tokens, got 9 sequences and 8"),
    ],
)
def test_limits_name_the_rule_that_is_broken(changes: dict[str, int], rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        replace(LIMITS, **changes)


def test_a_cache_of_another_size_than_the_limits_is_refused() -> None:
    with pytest.raises(ConfigError, match="32 blocks of 4 tokens, the cache has 8 of 4"):
        Engine(fake_config(), FakeModel(), fake_cache(8, 4), LIMITS)
