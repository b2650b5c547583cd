"""Replicas in lockstep: a prompt on one does not make the streams of another wait longer than allowed."""

from dataclasses import replace

import pytest

from cluster.engine import Engine, ScheduledStep
from cluster.limits import EngineLimits
from cluster.request import GenerationRequest
from cluster.step_header import AgreedStep, StepHeader, agree
from cluster.topology import Topology
from model_shards.sampling import SamplingParams
from tests.fakes import FakeModel, FakeRouted, fake_cache, fake_config

SLOWDOWN = 2.0
LIMITS = EngineLimits(
    max_model_len=2000,
    max_num_seqs=4,
    max_num_batched_tokens=256,
    block_size=16,
    num_blocks=512,
    num_micro_batches=1,
    max_decode_slowdown=SLOWDOWN,
)
SECONDS_A_STEP, SECONDS_A_TOKEN = 0.1, 1e-3


def make_engine() -> Engine:
    return Engine(fake_config(), FakeModel(), fake_cache(LIMITS.num_blocks, LIMITS.block_size), LIMITS)


def request(name: str, prompt: int, output: int) -> GenerationRequest:
    return GenerationRequest(name, (1,) * prompt, output, SamplingParams(0.0, seed=0), ignore_eos=True)


def step_together(engines: list[Engine], last: AgreedStep | None) -> tuple[list[ScheduledStep], AgreedStep, float]:
    """One step of the cell as the step loops make it; it takes a time, and that of all prefill tokens."""
    steps = [
        engine.schedule() if last is None else engine.schedule(last.elsewhere(rank))
        for rank, engine in enumerate(engines)
    ]
    headers = [
        StepHeader(1, (step.num_tokens,), False, step.num_prefill_tokens, step.has_prefill, step.allowed_prefill)
        for step in steps
    ]
    headers.append(StepHeader(1, (0,), False))  # of the expert rank
    agreed = agree([header.row() for header in headers], 1, Topology(len(engines), 1), 1)
    seconds = SECONDS_A_STEP + SECONDS_A_TOKEN * sum(step.num_prefill_tokens for step in steps)
    for rank, (engine, step) in enumerate(zip(engines, steps, strict=True)):
        if step.num_tokens:
            sampled = replace(engine.run(step, [FakeRouted()]), seconds=seconds)
            engine.commit(step, sampled, agreed.elsewhere(rank))
        else:
            engine.abandon(step)  # as of a replica without a part in the step
    return steps, agreed, seconds


@pytest.mark.parametrize("num_prompted", [1, 2])
def test_a_prompt_on_one_replica_is_bounded_by_the_streams_of_another(num_prompted: int) -> None:
    engines = [make_engine() for _ in range(1 + num_prompted)]
    streams = engines[-1]
    streams.add(request("stream", 4, 400))
    agreed = None
    for _ in range(6):
        _, agreed, _ = step_together(engines, agreed)
    for engine in engines[:-1]:
        engine.add(request("prompt", 1500, 2))
    slow = []
    held_back = 0
    while any(engine.has_work() for engine in engines[:-1]):
        steps, agreed, seconds = step_together(engines, agreed)
        assert steps[-1].num_tokens == 1, "the stream goes on"
        slow.append(seconds / SECONDS_A_STEP)
        held_back += not any(step.num_prefill_tokens for step in steps)
    assert max(slow) <= SLOWDOWN * 1.01
    assert held_back <= len(slow) // 4
    assert len(slow) < 1500 * num_prompted / (0.5 * (SLOWDOWN - 1) * SECONDS_A_STEP / SECONDS_A_TOKEN)


def test_without_streams_elsewhere_a_prompt_has_the_whole_step() -> None:
    engines = [make_engine(), make_engine()]
    engines[1].add(request("stream", 4, 3))
    agreed = None
    while engines[1].has_work():
        _, agreed, _ = step_together(engines, agreed)
    engines[0].add(request("prompt", 1500, 1))
    _, agreed, _ = step_together(engines, agreed)
    steps, _, _ = step_together(engines, agreed)
    assert steps[0].num_prefill_tokens == LIMITS.max_num_batched_tokens
