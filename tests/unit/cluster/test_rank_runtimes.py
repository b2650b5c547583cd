"""The two rank runtimes, thread and front end together: what a request sees when epochs come, go and fail."""

import asyncio
import copy
import subprocess
import sys
from dataclasses import replace

import pytest

from cluster.engine import Engine
from cluster.outputs import merge_outputs
from cluster.request import FinishReason, StepOutput
from model_shards.errors import InvalidRequestError, UnavailableError
from model_shards.experts import ExpertShardModel
from model_shards.quantization import Quantization, quantize_rows
from tests.reference import hf_greedy, make_hf_config, random_hf_model, save_checkpoint
from tests.tiny_cell import DEADLINE_S, TinyCell, greedy, tiny_cell

POISON = 7  # tokens: a prompt of this length kills the expert shard's step


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return random_hf_model(make_hf_config(num_hidden_layers=2), seed=3)


@pytest.fixture(scope="module")
def directory(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(model, path)
    return path


@pytest.fixture
def poison(monkeypatch):
    forward = ExpertShardModel.forward

    def poisoned(self, layer, hidden, local_ids, weights):
        if hidden.shape[0] == POISON:
            raise RuntimeError("out of memory, as it were")
        return forward(self, layer, hidden, local_ids, weights)

    monkeypatch.setattr(ExpertShardModel, "forward", poisoned)


def tokens_of(outputs: list[StepOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def test_a_request_streams_to_its_end_and_the_same_id_cannot_run_twice(directory, model):
    async def scenario() -> None:
        async with tiny_cell(directory) as cell:
            await cell.next_epoch()
            stream = cell.replica.generate(greedy("a", 5, 20))
            first = await asyncio.wait_for(anext(stream), DEADLINE_S)
            with pytest.raises(InvalidRequestError, match="request id a is already running"):
                await cell.generate(greedy("a", 5, 20))
            outputs = [first, *[output async for output in stream]]
            assert tokens_of(outputs) == hf_greedy(model, [1, 2, 3, 4, 5], 20)
            assert [output.finish_reason for output in outputs[:-1]] == [None] * (len(outputs) - 1)
            assert outputs[-1].finish_reason is FinishReason.LENGTH

    asyncio.run(scenario())


IN_8_BITS = ("q_proj", "kv_a_proj_with_mqa", "o_proj", "gate_proj", "up_proj", "down_proj")


def test_with_weights_of_attention_in_8_bits_tokens_are_those_of_the_rounded_weights(directory, model):
    rounded = copy.deepcopy(model)
    changed = 0
    for name, weight in rounded.named_parameters():
        if name.removesuffix(".weight").endswith(IN_8_BITS) and ".experts." not in name:
            rows = quantize_rows(weight.data, Quantization.INT8)
            weight.data.copy_(rows.values * rows.scale_inv[:, None])
            changed += 1
    assert changed == 3 + 3 + 3 + 3  # attention, and a dense MLP or shared experts, of two layers

    async def scenario() -> None:
        async with tiny_cell(directory, attention_weights="int8") as cell:
            await cell.next_epoch()
            assert tokens_of(await cell.generate(greedy("a", 5, 100))) == hf_greedy(rounded, [1, 2, 3, 4, 5], 100)

    assert hf_greedy(rounded, [1, 2, 3, 4, 5], 100) != hf_greedy(model, [1, 2, 3, 4, 5], 100)
    asyncio.run(scenario())


def test_leaving_a_stream_frees_its_blocks_and_wakes_nobody_for_longer(directory):
    async def scenario() -> None:
        async with tiny_cell(directory) as cell:
            await cell.next_epoch()
            stream = cell.replica.generate(greedy("a", 5, 100))
            await asyncio.wait_for(anext(stream), DEADLINE_S)
            assert cell.replica.load().num_free_blocks < cell.spec.limits.num_blocks
            await stream.aclose()
            # The next request's outputs come from a step behind the cancellation.
            await cell.generate(greedy("b", 3, 2))
            steps = cell.replica.load().num_steps
            assert cell.replica.load().num_running <= 1
            await cell.generate(greedy("c", 3, 2))
            load = cell.replica.load()
            assert load.num_steps == steps + 2
            assert (load.num_running, load.num_free_blocks) == (0, cell.spec.limits.num_blocks)

    asyncio.run(scenario())


def test_what_a_slow_consumer_missed_arrives_as_one_output_and_an_error_wins():
    async def scenario() -> None:
        stream: asyncio.Queue[StepOutput | UnavailableError] = asyncio.Queue()
        for token, reason in ((2, None), (3, FinishReason.LENGTH)):
            stream.put_nowait(StepOutput("a", (token,), reason, num_cached_tokens=16))
        merged = merge_outputs(StepOutput("a", (1,), num_cached_tokens=16), stream)
        assert merged == StepOutput("a", (1, 2, 3), FinishReason.LENGTH, num_cached_tokens=16)
        error = UnavailableError("gone")
        for output in (StepOutput("a", (2,)), error):
            stream.put_nowait(output)
        assert merge_outputs(StepOutput("a", (1,)), stream) is error
        assert merge_outputs(error, stream) is error

    asyncio.run(scenario())


def test_a_request_that_kills_the_shard_whenever_it_is_computed_ends_and_others_go_on(directory, model, poison):
    async def scenario() -> None:
        async with tiny_cell(directory) as cell:
            cell.keep_going()
            await cell.next_epoch()
            deadly = asyncio.create_task(cell.generate(greedy("deadly", POISON, 5)))
            [end] = await deadly
            assert end.finish_reason is FinishReason.ERROR
            assert "lost a rank in each of 3 attempts" in (end.error or "")
            assert cell.num_epochs == 3
            assert tokens_of(await cell.generate(greedy("b", 4, 6))) == hf_greedy(model, [1, 2, 3, 4], 6)
            assert cell.replica.load().num_free_blocks == cell.spec.limits.num_blocks

    asyncio.run(scenario())


def test_requests_wait_for_the_next_epoch_and_end_when_it_does_not_come(directory, model, poison):
    async def scenario() -> None:
        async with tiny_cell(directory, rejoin_timeout_s=0.3) as cell:
            await cell.next_epoch()
            with pytest.raises(UnavailableError, match=r"epoch 1 ended and no other followed within 0\.3 s"):
                await cell.generate(greedy("deadly", POISON, 5))
            refusals = []
            for _ in range(2):
                with pytest.raises(UnavailableError, match="no other followed") as refused:
                    await cell.generate(greedy("late", 4, 5))
                refusals.append(refused.value)
            assert refusals[0] is not refusals[1], "one exception raised twice keeps the frames of both"
            await cell.both_ended()
            await cell.next_epoch()
            assert tokens_of(await cell.generate(greedy("b", 4, 6))) == hf_greedy(model, [1, 2, 3, 4], 6)

    asyncio.run(scenario())


def test_a_fault_of_the_replica_itself_fails_its_requests_at_once(directory, monkeypatch):
    def faulty(self, step, routed):
        raise RuntimeError("a fault of ours")

    async def scenario() -> None:
        async with tiny_cell(directory) as cell:
            await cell.next_epoch()
            with monkeypatch.context() as patch:
                patch.setattr(Engine, "run", faulty)
                with pytest.raises(UnavailableError, match="a step failed on this replica"):
                    await cell.generate(greedy("a", 4, 5))
            assert sorted(end.is_fault for end in await cell.both_ended()) == [False, True]

    asyncio.run(scenario())


def test_logits_that_are_not_finite_end_their_request_alone(directory, model, monkeypatch):
    run = Engine.run

    def broken(self, step, routed):
        sampled = run(self, step, routed)
        if step.sampled[0].request.request_id != "a":
            return sampled
        return replace(sampled, tokens=(type(sampled.tokens[0])(-1), *sampled.tokens[1:]))

    async def scenario() -> None:
        async with tiny_cell(directory) as cell:
            await cell.next_epoch()
            with monkeypatch.context() as patch:
                patch.setattr(Engine, "run", broken)
                [end] = await cell.generate(greedy("a", 4, 5))
            assert end.finish_reason is FinishReason.ERROR
            assert "logits are not finite at position 4" in (end.error or "")
            assert tokens_of(await cell.generate(greedy("b", 4, 6))) == hf_greedy(model, [1, 2, 3, 4], 6)

    asyncio.run(scenario())


async def join_alone(cell: TinyCell) -> "asyncio.Future[None]":
    """The replica joins an epoch whose shard does not come."""
    joining = asyncio.wrap_future(cell.replica.join(cell.membership(), 0))
    await asyncio.sleep(0.2)
    assert not joining.done()
    return joining


def test_a_rank_told_to_leave_an_epoch_that_it_joins_gives_it_up_at_once(directory):
    async def scenario() -> None:
        async with tiny_cell(directory) as cell:
            joining = await join_alone(cell)
            cell.replica.leave(cell.num_epochs - 1)
            await asyncio.sleep(0.1)
            assert not joining.done(), "that word was about an older epoch"
            cell.replica.leave(cell.num_epochs)
            with pytest.raises(UnavailableError, match="rank A0 was told to leave epoch 1 while it was joined"):
                await asyncio.wait_for(joining, DEADLINE_S)
            await cell.ends.get()
            await cell.next_epoch()

    asyncio.run(scenario())


def test_one_rank_that_gives_up_joining_frees_the_others(directory):
    async def scenario() -> None:
        async with tiny_cell(directory) as cell:
            membership = cell.membership()
            joining = asyncio.wrap_future(cell.replica.join(membership, 0))
            cell.shard.leave(membership.epoch)  # before it joins: it gives up as soon as it does
            late = asyncio.wrap_future(cell.shard.join(membership, 1))
            for join in (joining, late):
                with pytest.raises(UnavailableError, match="rank E0 was told to leave epoch 1"):
                    await asyncio.wait_for(join, DEADLINE_S)

    asyncio.run(scenario())


def test_a_replica_closes_in_the_middle_of_a_join(directory):
    async def scenario() -> None:
        async with tiny_cell(directory) as cell:
            joining = await join_alone(cell)
            assert await cell.replica.close(5.0)
            with pytest.raises(UnavailableError, match="this replica is shutting down"):
                await cell.generate(greedy("late", 4, 5))
            with pytest.raises(UnavailableError):
                await joining

    asyncio.run(scenario())


def test_of_several_epochs_to_join_only_the_newest_is_tried(directory):
    async def scenario() -> None:
        async with tiny_cell(directory) as cell:
            first = await join_alone(cell)
            newest = cell.membership()
            stale = replace(newest, epoch=1)
            # Both wait in line before the first is given up.
            second = asyncio.wrap_future(cell.replica.join(stale, 0))
            third = asyncio.wrap_future(cell.replica.join(newest, 0))
            cell.replica.leave(1)
            with pytest.raises(UnavailableError, match="told to leave epoch 1"):
                await asyncio.wait_for(first, DEADLINE_S)
            with pytest.raises(UnavailableError, match="epoch 1 was superseded"):
                await asyncio.wait_for(second, DEADLINE_S)
            await asyncio.wait_for(asyncio.wrap_future(cell.shard.join(newest, 1)), DEADLINE_S)
            await asyncio.wait_for(third, DEADLINE_S)

    asyncio.run(scenario())


def test_the_c_library_waits_a_second_and_not_five_for_a_lost_answer_about_a_peers_name():
    """torch's store asks DNS for the names of its peers, in the one thread that serves all ranks."""
    code = (
        "import ctypes\n"
        "from cluster.rendezvous import connect_rendezvous, serve_rendezvous\n"
        "server = serve_rendezvous('127.0.0.1')\n"
        "libc = ctypes.CDLL(None)\n"
        "libc.__res_state.restype = ctypes.POINTER(ctypes.c_int * 2)\n"
        "libc.__res_init()\n"
        "print(*libc.__res_state().contents)\n"
    )
    told = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60)
    assert told.stdout.split() == ["1", "1"]
