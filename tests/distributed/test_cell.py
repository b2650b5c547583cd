"""Whole cells of plain processes: greedy tokens equal transformers', whatever the topology and the scheduling."""

import dataclasses
import time

import pytest

from cluster.cell import Cell
from cluster.request import FinishReason, GenerationRequest
from model_shards.errors import UnavailableError
from tests.cells import (
    GREEDY,
    LIMITS,
    NUM_TOKENS,
    assert_equal_to_transformers,
    assert_greedy_up_to_rounding,
    make_expected,
    requests_of,
    spec_of,
)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    return make_expected(tmp_path_factory.mktemp("checkpoint"), seed=7)


def serve_all(cell, num_attention, expected, after_outputs):
    """Runs all prompts; `after_outputs` maps a count of outputs to what is done once so many have come."""
    todo = dict(after_outputs)
    tokens = {request.request_id: () for request in requests_of(expected)}
    for index, request in enumerate(requests_of(expected)):
        cell.submit(index % num_attention, request)
    running = set(tokens)
    outputs = cell.outputs(60.0)
    count = 0
    while running:
        output = next(outputs)
        count += 1
        tokens[output.request_id] += output.token_ids
        if output.finish_reason is not None:
            assert output.finish_reason is FinishReason.LENGTH
            running.discard(output.request_id)
        if count in todo:
            todo.pop(count)()
    assert not todo
    return tokens


@pytest.mark.parametrize(
    ("num_attention", "num_expert", "limits"),
    [
        pytest.param(1, 1, {}, id="1-1"),
        pytest.param(1, 3, {"num_micro_batches": 2}, id="1-3-two-micro-batches"),
        pytest.param(2, 2, {"num_micro_batches": 3, "choose_micro_batches": True}, id="2-2-chosen-micro-batches"),
        pytest.param(
            2,
            4,
            {"num_micro_batches": 3, "max_num_batched_tokens": 17, "max_num_seqs": 16, "max_decode_slowdown": 1.2},
            id="2-4-three-small-chunks-bounded-prefills",
        ),
    ],
)
def test_greedy_tokens_of_16_concurrent_prompts_equal_transformers(expected, num_attention, num_expert, limits):
    spec = spec_of(expected, num_attention, num_expert, limits=dataclasses.replace(LIMITS, **limits))
    with Cell(spec) as cell:
        assert_equal_to_transformers(expected, cell.generate(requests_of(expected), timeout_s=60.0))


@pytest.mark.parametrize(
    ("num_attention", "num_expert", "limits"),
    [
        pytest.param(3, 2, {"num_blocks": 20, "max_decode_slowdown": 1.2}, id="3-2-bounded-prefills"),
        pytest.param(
            1,
            2,
            {"num_blocks": 16, "max_num_batched_tokens": 19, "max_num_seqs": 16, "num_micro_batches": 2},
            id="1-2-small-chunks-two-micro-batches",
        ),
    ],
)
def test_a_tiny_cache_preempts_on_every_replica_and_changes_no_token(expected, num_attention, num_expert, limits):
    spec = spec_of(expected, num_attention, num_expert, limits=dataclasses.replace(LIMITS, **limits))
    with Cell(spec) as cell:
        assert_equal_to_transformers(expected, cell.generate(requests_of(expected), timeout_s=60.0))
        assert all(cell.load(attention_rank).num_preemptions > 0 for attention_rank in range(num_attention))


def test_cancelling_a_request_frees_its_blocks_within_a_step(expected):
    spec = spec_of(expected, 1, 1, limits=dataclasses.replace(LIMITS, max_model_len=2048))
    long = GenerationRequest("long", tuple([1] * 200), 1800, GREEDY, ignore_eos=True)
    other = GenerationRequest("other", (1,), 2000, GREEDY, ignore_eos=True)
    with Cell(spec) as cell:
        cell.submit(0, long)
        cell.submit(0, other)
        seen = set()
        for output in cell.outputs(30.0):
            seen.add(output.request_id)
            if seen == {"long", "other"}:
                break
        cell.cancel(0, "long")
        before = cell.load(0)
        # The step under way and the boundary that takes the cancellation in; the other request keeps the cell stepping.
        while (after := cell.load(0)).num_steps < before.num_steps + 2:
            pass
        assert (before.num_running, after.num_running) == (2, 1)
        assert after.num_free_blocks >= before.num_free_blocks + 200 // LIMITS.block_size


def test_bf16_tokens_are_greedy_up_to_rounding(expected):
    with Cell(spec_of(expected, 2, 3, dtype="bfloat16")) as cell:
        tokens = cell.generate(requests_of(expected), timeout_s=60.0)
    assert_greedy_up_to_rounding(expected, tokens)


def test_an_epoch_change_under_way_neither_loses_nor_doubles_nor_changes_a_token(expected):
    with Cell(spec_of(expected, 2, 2)) as cell:
        changes = dict.fromkeys((40, 200, 500), cell.next_epoch)
        assert_equal_to_transformers(expected, serve_all(cell, 2, expected, changes))


def test_experts_killed_under_way_and_at_rest_neither_lose_nor_double_nor_change_a_token(expected):
    """With two replicas: one may have committed the step that the other had to abandon."""
    with Cell(spec_of(expected, 2, 2)) as cell:

        def kill_and_replace(global_rank):
            cell.processes[global_rank].kill()
            cell.replace(global_rank)

        losses = {60: lambda: kill_and_replace(2), 400: lambda: kill_and_replace(3)}
        assert_equal_to_transformers(expected, serve_all(cell, 2, expected, losses))
        kill_and_replace(2)  # all sleep, and none of them sees it die
        assert list(cell.generate(requests_of(expected)[:1], timeout_s=30.0)["r0"]) == expected.tokens[0]


def test_an_idle_cell_wakes_for_a_request_and_sleeps_again(expected):
    with Cell(spec_of(expected, 2, 2)) as cell:
        for index, request in enumerate(requests_of(expected)[:4]):
            tokens = cell.generate([request], timeout_s=30.0)
            assert list(tokens[request.request_id]) == expected.tokens[index]


def test_a_killed_expert_is_noticed_and_named_and_the_other_processes_end(expected):
    with Cell(spec_of(expected, 1, 2)) as cell:
        for index, request in enumerate(requests_of(expected)):
            cell.submit(0, dataclasses.replace(request, request_id=f"k{index}"))
        outputs = cell.outputs(30.0)
        next(outputs)
        processes = cell.processes
        processes[2].kill()
        with pytest.raises(UnavailableError, match="rank E1 died"):
            list(outputs)
    assert not any(process.is_alive() for process in processes)


@pytest.mark.parametrize(
    ("dtype", "backend", "num_micro_batches"),
    [("bfloat16", "shm", 1), ("float32", "shm", 2), ("float32", "gloo", 1)],
)
def test_the_parts_of_steps_are_told_and_add_up(expected, dtype, backend, num_micro_batches):
    limits = dataclasses.replace(LIMITS, num_micro_batches=num_micro_batches)
    spec = dataclasses.replace(spec_of(expected, 1, 2, dtype=dtype, limits=limits), data_backend=backend)
    with Cell(spec) as cell:
        begun = time.perf_counter()
        cell.generate(requests_of(expected), timeout_s=60.0)
        times = cell.load(0).times
        seconds = time.perf_counter() - begun
    assert times.num_steps >= NUM_TOKENS
    assert 0 < times.step_s < seconds
    assert 0 < times.waited_s < times.step_s
    assert 0 < times.experts_s < seconds


def test_a_request_that_can_never_fit_is_refused_with_the_numbers_and_the_next_one_is_served(expected):
    with Cell(spec_of(expected, 1, 1)) as cell:
        with pytest.raises(UnavailableError, match="256"):
            cell.generate([GenerationRequest("big", tuple([1] * 250), 64, GREEDY)], timeout_s=30.0)
        request = requests_of(expected)[0]
        assert list(cell.generate([request], timeout_s=30.0)["r0"]) == expected.tokens[0]
