"""Real layers over a shared cache: greedy tokens are those of each request alone without it, and transformers'."""

import dataclasses
import random

import pytest
import torch

from cluster.dispatch import LocalDispatcher, StepPlan
from cluster.engine import Engine
from cluster.limits import EngineLimits
from cluster.request import GenerationRequest
from model_shards.config import load_model_config
from model_shards.kv_cache import LatentKVCache
from model_shards.placement import contiguous_placement
from model_shards.quantization import Quantization
from model_shards.weights import load_attention_model, load_expert_shard
from tests.cells import EVERY_BRANCH, GREEDY, LIMITS
from tests.reference import hf_greedy, make_hf_config, random_hf_model, save_checkpoint

CPU = torch.device("cpu")
NUM_TOKENS = 14
NUM_SHARDS = 3


class Cell:
    """One checkpoint in this process, and the requests that it is asked."""

    def __init__(self, directory):
        model = random_hf_model(make_hf_config(**EVERY_BRANCH), seed=11)
        save_checkpoint(model, directory)
        self.config = load_model_config(directory)
        placement = contiguous_placement(self.config.n_routed_experts or 0, NUM_SHARDS)
        shards = [load_expert_shard(directory, self.config, held, torch.float32, CPU) for held in placement.shards]
        self.dispatcher = LocalDispatcher(shards, placement, CPU)
        self.model = load_attention_model(directory, self.config, torch.float32, CPU)
        draw = random.Random(3)
        tokens = [draw.randrange(self.config.vocab_size) for _ in range(200)]
        system, other = tokens[:50], tokens[50:90]
        questions = [tokens[90 + 7 * index :][: index + 1] for index in range(4)]
        prompts = [[*system, *question] for question in questions]
        prompts += [system, [*system[:32], 1], system[:33], [*other, *questions[2]], other]
        self.expected = {f"r{index}": hf_greedy(model, prompt, NUM_TOKENS) for index, prompt in enumerate(prompts)}
        # The second turn of a conversation: its prompt holds an answer, which decoding computed.
        for index in (0, 8):
            turn = [*prompts[index], *self.expected[f"r{index}"], *questions[3]]
            self.expected[f"r{len(prompts)}"] = hf_greedy(model, turn, NUM_TOKENS)
            prompts.append(turn)
        self.requests = [
            GenerationRequest(f"r{index}", tuple(prompt), NUM_TOKENS, GREEDY, ignore_eos=True)
            for index, prompt in enumerate(prompts)
        ]

    def engine(self, limits: EngineLimits, quantization: Quantization | None = None) -> Engine:
        cache = LatentKVCache(self.config, limits.num_blocks, limits.block_size, torch.float32, CPU, quantization)
        return Engine(self.config, self.model, cache, limits)

    def compute(self, engine, step):
        self.dispatcher.begin_step(StepPlan(1, (tuple(batch.num_tokens for batch in step.micro_batches),)))
        return engine.run(step, [self.dispatcher.routed(index) for index in range(len(step.micro_batches))])


@pytest.fixture(scope="module")
def cell(tmp_path_factory):
    return Cell(tmp_path_factory.mktemp("checkpoint"))


def serve(cell, engine, at_once, cancels, lost):
    """Tokens of every request, of which at most `at_once` are in the engine.

    `cancels`: step -> request that is cancelled while it runs, and comes again as the last. `lost`: steps whose result
    is thrown away.
    """
    tokens = {request.request_id: [] for request in cell.requests}
    coming, running, number = list(cell.requests), {}, 0
    while coming or running:
        while coming and len(running) < at_once:
            request = coming.pop(0)
            engine.add(request)
            running[request.request_id] = request
        step = engine.schedule()
        sampled = cell.compute(engine, step)
        leaves = cancels.get(number)
        if leaves in running:
            engine.cancel(leaves)
            coming.append(running.pop(leaves))
            tokens[leaves] = []
        if number in lost:
            engine.abandon(step)
        else:
            for output in engine.commit(step, sampled):
                tokens[output.request_id] += output.token_ids
                if output.finish_reason is not None:
                    del running[output.request_id]
        engine.check_integrity()
        number += 1
    return tokens


SMALL_CHUNKS = {"max_num_batched_tokens": 17, "max_num_seqs": 5, "num_micro_batches": 2}
TINY_CACHE = {"block_size": 8, "num_blocks": 20, "max_model_len": 160}


@pytest.mark.parametrize(
    ("limits", "at_once", "cancels", "lost"),
    [
        pytest.param({}, 1, {}, set(), id="one-after-the-other"),
        pytest.param({}, 14, {}, set(), id="all-at-once"),
        pytest.param({"block_size": 1, "num_blocks": 2000}, 3, {}, set(), id="blocks-of-one-token"),
        pytest.param(
            SMALL_CHUNKS, 5, {9: "r3", 20: "r5", 30: "r8"}, set(), id="small-chunks-two-micro-batches-cancels"
        ),
        pytest.param(
            {**SMALL_CHUNKS, **TINY_CACHE, "num_micro_batches": 3},
            6,
            {12: "r4", 24: "r6"},
            set(range(5, 40, 5)),
            id="preempting-three-micro-batches-cancels-lost-steps",
        ),
    ],
)
def test_tokens_do_not_depend_on_what_the_cache_holds(cell, limits, at_once, cancels, lost):
    engine = cell.engine(dataclasses.replace(LIMITS, **limits))
    for _ in range(2):  # the second time, what the first left behind is in the cache
        assert serve(cell, engine, at_once, cancels, lost) == cell.expected
    load = engine.load()
    assert load.num_cached_tokens > 0
    assert load.num_free_blocks == load.num_blocks
    assert (load.num_preemptions > 0) == ("num_blocks" in limits and limits["num_blocks"] < 100)


def test_each_request_alone_without_the_cache_has_the_same_tokens(cell):
    engine = cell.engine(dataclasses.replace(LIMITS, prefix_cache=False))
    assert serve(cell, engine, 1, {}, set()) == cell.expected
    assert engine.load().num_cached_tokens == 0


@pytest.mark.parametrize("quantization", list(Quantization))
def test_tokens_of_a_quantized_cache_do_not_depend_on_what_it_holds(cell, quantization):
    alone = serve(cell, cell.engine(dataclasses.replace(LIMITS, prefix_cache=False), quantization), 1, {}, set())
    limits = dataclasses.replace(LIMITS, **{**SMALL_CHUNKS, **TINY_CACHE})
    engine = cell.engine(limits, quantization)
    for _ in range(2):
        assert serve(cell, engine, 6, {12: "r4", 24: "r6"}, set(range(5, 40, 5))) == alone
    load = engine.load()
    assert load.num_cached_tokens > 0
    assert load.num_preemptions > 0
