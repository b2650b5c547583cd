"""Layers as compiled programs against transformers in float32, and what they were compiled from."""

import gc
import weakref
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model_shards.batch import AttentionBatch
from model_shards.blockwise_attention import BlockwiseAttention
from model_shards.compiled.lane import Lane
from model_shards.errors import CheckpointError
from model_shards.kernels import arena
from model_shards.kernels.grouped_product import PackedMatrices
from model_shards.kv_cache import LatentKVCache
from model_shards.model import AttentionModel
from model_shards.packing import PackedInt8, program_instructions
from model_shards.pipeline import run_micro_batches
from model_shards.quantization import Quantization
from model_shards.up_projection import laid_out_bytes
from tests.reference import (
    CPU,
    YARN_ROPE,
    Chunk,
    ShardExperts,
    attention_model_of,
    build_batch,
    empty_batch,
    expert_shard_of,
    hf_logits,
    make_hf_config,
    random_hf_model,
    random_tokens,
    relative_error,
    run_steps,
    single_sequence_batch,
)

pytestmark = pytest.mark.skipif(
    program_instructions(torch.bfloat16, CPU) is None, reason="a CPU without AVX512_BF16 has no programs"
)

# The smallest sizes that there are programs for.
WIDE: dict[str, object] = {
    "hidden_size": 96,
    "intermediate_size": 80,
    "moe_intermediate_size": 48,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 64,
    "n_routed_experts": 32,
    "num_experts_per_tok": 4,
}
GROUPED = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 4.0}
BRANCHES: dict[str, dict[str, object]] = {
    "plain": {},
    "q_lora": {"q_lora_rank": 48},
    "groups": GROUPED,
    "norm_topk_prob": {"norm_topk_prob": True},
    "no shared experts": {"n_shared_experts": None},
    "no routed experts": {"n_routed_experts": None},
    "dense layers between": {"moe_layer_freq": 2, "num_hidden_layers": 5},
    "no dense layer": {"first_k_dense_replace": 0},
    "tied embeddings": {"tie_word_embeddings": True},
    "heads of whole registers": {"qk_rope_head_dim": 32},
    "the hidden size widest": {"hidden_size": 240},
    "a dense layer widest": {"intermediate_size": 320},
    "shared experts widest": {"moe_intermediate_size": 160, "n_shared_experts": 2},
    "the queries' rank widest": {"q_lora_rank": 256},
    "another eps": {"rms_norm_eps": 1e-2, "q_lora_rank": 48},
    "the whole of V2": {**GROUPED, "q_lora_rank": 48, "rope_parameters": YARN_ROPE},
}


def new_cache(
    model: AttentionModel, blocks: int, quantization: Quantization | None = None, block_size: int = 4
) -> LatentKVCache:
    return LatentKVCache(model.config, blocks, block_size, torch.bfloat16, CPU, quantization)


class Pair:
    """One model twice: compiled, and as modules; with experts that are the same for both."""

    def __init__(self, in_int8: bool = False, **overrides: object) -> None:
        # Weights that bfloat16 holds exactly, for everybody.
        self.reference = random_hf_model(make_hf_config(**{**WIDE, **overrides}), seed=3).bfloat16().float()
        self.plain = attention_model_of(self.reference, torch.bfloat16)
        self.compiled = attention_model_of(self.reference, torch.bfloat16)
        self.compiled.lay_out(in_int8)
        self.error = 0.07 if in_int8 else 0.04  # of logits, at most
        if in_int8:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("model_shards.model.serves", lambda config, instructions: False)
                self.plain.lay_out(in_int8)
        self.routed = ShardExperts(expert_shard_of(self.reference, dtype=torch.bfloat16))


def in_parts(
    model: AttentionModel, routed: ShardExperts, tokens: Sequence[int], sizes: Sequence[int], cache: LatentKVCache
) -> torch.Tensor:
    """Logits of all tokens; a part of one token is a decode."""
    start, logits = 0, []
    for size in sizes:
        batch = single_sequence_batch(tokens[start:][:size], cache.block_size, start, decode=size == 1 and start > 0)
        logits.append(run_steps(model, batch, cache, routed))
        start += size
    return torch.cat(logits)


def usual_error(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """The median over tokens of the relative error of their logits."""
    return float(((logits - expected).norm(dim=1) / expected.norm(dim=1)).median())


@pytest.mark.parametrize(
    ("branch", "block_size"), [*((branch, 4) for branch in BRANCHES), ("heads of whole registers", 16)]
)
@pytest.mark.parametrize("in_int8", [False, True], ids=["bfloat16", "int8"])
def test_logits_are_as_near_to_float32_as_those_of_the_modules(branch: str, block_size: int, in_int8: bool) -> None:
    pair = Pair(in_int8, **BRANCHES[branch])
    assert pair.compiled.is_compiled
    assert not pair.plain.is_compiled
    tokens = random_tokens(131, 40, seed=2)
    expected = hf_logits(pair.reference, tokens)
    sizes = [20, 5, 9, *[1] * 6]
    plain = in_parts(pair.plain, pair.routed, tokens, sizes, new_cache(pair.plain, 10, block_size=block_size))
    compiled = in_parts(pair.compiled, pair.routed, tokens, sizes, new_cache(pair.compiled, 10, block_size=block_size))
    # Of the usual token: a near tie in the gate, decided otherwise, changes one token's logits altogether.
    assert usual_error(compiled, expected) < pair.error
    assert usual_error(compiled, expected) < 1.4 * usual_error(plain, expected)


def test_in_8_bits_are_all_products_but_those_that_the_latents_meet_and_the_gate_s() -> None:
    pair, narrow = Pair(**BRANCHES["the whole of V2"]), Pair(in_int8=True, **BRANCHES["the whole of V2"])
    assert pair.compiled._compiled is not None
    assert narrow.compiled._compiled is not None
    for layer, of_8_bits in zip(pair.compiled._compiled._layers, narrow.compiled._compiled._layers, strict=True):
        for name in ("first", "q_b", "output", "gate_up", "down"):
            matrices = getattr(of_8_bits, name)
            assert isinstance(matrices, PackedInt8)
            assert 2 * matrices.nbytes == getattr(layer, name).nbytes
        assert isinstance(of_8_bits.up.valuing, PackedMatrices)
    left = {name for name, view in narrow.plain.hf_slices() if view.numel() and view.dim() == 2}
    kept = ("embed_tokens.weight", "gate.weight")
    assert left
    assert all(name.endswith(kept) for name in left)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_logits_matrix_is_in_8_bits_where_such_are_multiplied(dtype: torch.dtype) -> None:
    model = attention_model_of(random_hf_model(make_hf_config(**WIDE), seed=3).bfloat16(), dtype)
    assert model.lm_head is not None
    weight = model.lm_head.weight.data.double()
    model.lay_out(in_int8=True)
    x = torch.randn(7, weight.shape[1], generator=torch.Generator().manual_seed(4)).bfloat16()
    error = relative_error(model.lm_head.product(x.to(dtype)), x.double() @ weight.T)
    assert 1e-3 < error < 3e-2 if dtype is torch.bfloat16 else error < 1e-6


def test_a_matrix_that_is_not_finite_is_not_taken_for_8_bits() -> None:
    reference = random_hf_model(make_hf_config(**WIDE), seed=3)
    for compiled in (True, False):
        model = attention_model_of(reference, torch.bfloat16 if compiled else torch.float32)
        model.model.decoder_layers[1].self_attn.o_proj.weight.data[3, 5] = float("inf")
        rule = "tensor model.layers.1.self_attn.o_proj.weight cannot be quantized: a value is not finite"
        with pytest.raises(CheckpointError, match=rule):
            model.lay_out(in_int8=True)


@pytest.fixture(scope="module", params=[False, True], ids=["bfloat16", "int8"])
def whole(request: pytest.FixtureRequest) -> Pair:
    return Pair(request.param, **BRANCHES["the whole of V2"])


PROMPTS = [random_tokens(131, length, seed=length) for length in (9, 2, 17, 5, 12)]
TABLES = [[5, 11, 2], [7], [1, 14, 9, 3, 12], [13, 4], [6, 10, 8]]


def prefilled(pair: Pair, count: int, quantization: Quantization | None = None) -> LatentKVCache:
    """A cache with all but the last token of the first prompts; block 0, which pads tables, is nobody's."""
    cache = new_cache(pair.compiled, 15, quantization)
    cache.data[:, 0].view(torch.uint8).fill_(0xFF)  # not a number, as a bfloat16 and as a scale
    for prompt, table in zip(PROMPTS[:count], TABLES, strict=False):
        run_steps(pair.compiled, build_batch([Chunk(prompt[:-1], 0, table)], 4), cache, pair.routed)
    return cache


def decode_chunk(index: int) -> Chunk:
    return Chunk(PROMPTS[index][-1:], len(PROMPTS[index]) - 1, TABLES[index], decode=True)


@pytest.mark.parametrize("quantization", [None, *Quantization])
def test_a_decode_of_a_short_context_has_the_same_logits_bit_for_bit_whoever_shares_its_batch(
    whole: Pair, quantization: Quantization | None
) -> None:
    cache = prefilled(whole, 5, quantization)

    def logits_of(*chunks: Chunk) -> torch.Tensor:
        return run_steps(whole.compiled, build_batch(chunks, 4), cache, whole.routed)

    alone = torch.cat([logits_of(decode_chunk(i)) for i in range(5)])
    together = logits_of(*(decode_chunk(i) for i in range(5)))
    assert torch.equal(together, alone)
    cache = prefilled(whole, 3, quantization)
    mixed = [decode_chunk(i) for i in range(3)] + [Chunk(PROMPTS[i], 0, TABLES[i], all_logits=False) for i in (3, 4)]
    logits = logits_of(*mixed)
    assert torch.equal(logits[:3], alone[:3])
    expected = torch.stack([hf_logits(whole.reference, PROMPTS[i])[-1] for i in (3, 4)])
    assert relative_error(logits[3:], expected) < (whole.error if quantization is None else 0.1)


def test_a_team_takes_parts_of_a_long_context_in_each_layer() -> None:
    pair = Pair(**BRANCHES["the whole of V2"])
    layers = pair.compiled._compiled
    assert layers is not None
    tokens = random_tokens(131, 220, seed=8)
    cache = new_cache(pair.compiled, 55)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        alone = in_parts(pair.compiled, pair.routed, tokens, [219, 1], cache)[-1]
        layers._uses_team = True
        (lane,) = layers._free
        lane._slots.fill_(float("nan"))
        batch = single_sequence_batch(tokens[219:], cache.block_size, 219, decode=True)
        shared = [run_steps(pair.compiled, batch, cache, pair.routed)[-1] for _ in range(2)]
    finally:
        torch.set_num_threads(before)
    assert int((~lane._slots[:, 0].isnan()).sum()) == 3
    assert torch.equal(*shared)
    assert relative_error(shared[0], alone) < 0.02


def batches() -> list[AttentionBatch]:
    return [build_batch([decode_chunk(0), decode_chunk(1)], 4), build_batch([decode_chunk(2)], 4), empty_batch()]


def test_micro_batches_that_take_turns_do_not_meet(whole: Pair) -> None:
    cache = prefilled(whole, 3)
    apart = [run_steps(whole.compiled, batch, cache, whole.routed) for batch in batches()]
    assert apart[2].shape == (0, 131)
    in_turn = run_micro_batches([whole.compiled.forward_steps(batch, cache, whole.routed) for batch in batches()])
    assert all(torch.equal(one, other) for one, other in zip(in_turn, apart, strict=True))


def test_an_abandoned_step_leaves_nothing_behind(whole: Pair) -> None:
    cache = prefilled(whole, 3)
    expected = run_steps(whole.compiled, batches()[0], cache, whole.routed)
    for layers in range(1, 3):
        steps = whole.compiled.forward_steps(batches()[1], cache, whole.routed)
        for _ in range(layers):
            next(steps)
        steps.close()
        assert torch.equal(run_steps(whole.compiled, batches()[0], cache, whole.routed), expected)


@pytest.mark.parametrize("quantization", [None, *Quantization])
def test_one_team_of_threads_computes_what_one_thread_does(
    whole: Pair, quantization: Quantization | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = prefilled(whole, 4, quantization)
    batch = build_batch([*(decode_chunk(i) for i in range(4)), Chunk(PROMPTS[4], 0, TABLES[4])], 4)
    expected = run_steps(whole.compiled, batch, cache, whole.routed)
    assert whole.compiled._compiled is not None
    monkeypatch.setattr(whole.compiled._compiled, "_uses_team", True)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(run_steps(whole.compiled, batch, cache, whole.routed), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("shares", "order"),
    [(False, ["dispatch", "shared"]), (True, ["shared", "dispatch"])],
)
def test_shared_experts_are_computed_first_where_the_routed_ones_would_take_the_cores(
    shares: bool, order: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = Pair(first_k_dense_replace=2, num_hidden_layers=3)
    cache = new_cache(pair.compiled, 4)
    expected = run_steps(pair.compiled, single_sequence_batch([5, 6], 4), cache, pair.routed)
    pair.compiled.share_cores(shares)
    log: list[str] = []
    mlp, dispatch = Lane.mlp, pair.routed.dispatch

    def watched_mlp(lane: Lane, layer: int, threads: int) -> None:
        log.append("shared")
        mlp(lane, layer, threads)

    def watched_dispatch(*arguments: object) -> object:
        log.append("dispatch")
        return dispatch(*arguments)

    monkeypatch.setattr(Lane, "mlp", watched_mlp)
    monkeypatch.setattr(pair.routed, "dispatch", watched_dispatch)
    logits = run_steps(pair.compiled, single_sequence_batch([5, 6], 4), cache, pair.routed)
    assert log[-2:] == order
    assert torch.equal(logits, expected)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=8))
def test_any_chunks_give_the_logits_of_the_whole_prompt(whole: Pair, sizes: list[int]) -> None:
    tokens = random_tokens(131, sum(sizes), seed=5)
    expected = hf_logits(whole.reference, tokens)
    cache = new_cache(whole.compiled, 25)  # another each time: programs have the old one's address
    logits = in_parts(whole.compiled, whole.routed, tokens, sizes, cache)
    assert usual_error(logits, expected) < whole.error


def test_without_memory_for_a_larger_batch_nothing_is_computed_where_the_smaller_one_was(
    whole: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = Pair(**BRANCHES["the whole of V2"])
    cache = prefilled(pair, 3)
    expected = run_steps(pair.compiled, batches()[0], cache, pair.routed)
    empty = torch.empty
    left = [3]

    def scarce(*arguments: object, **keywords: object) -> torch.Tensor:
        left[0] -= 1
        if left[0] < 0:
            raise MemoryError("no memory")
        return empty(*arguments, **keywords)

    large = single_sequence_batch(random_tokens(131, 50, seed=1), 4)
    monkeypatch.setattr(arena.torch, "empty", scarce)
    with pytest.raises(MemoryError):
        run_steps(pair.compiled, large, cache, pair.routed)
    with pytest.raises(MemoryError):
        run_steps(pair.compiled, batches()[0], cache, pair.routed)
    monkeypatch.undo()
    assert torch.equal(run_steps(pair.compiled, batches()[0], cache, pair.routed), expected)
    assert run_steps(pair.compiled, large, new_cache(pair.compiled, 15), pair.routed).isfinite().all()


def test_a_cache_that_is_not_used_any_more_can_go(whole: Pair) -> None:
    first, second = new_cache(whole.compiled, 15), new_cache(whole.compiled, 15)
    run_micro_batches([whole.compiled.forward_steps(batch, first, whole.routed) for batch in batches()])
    run_steps(whole.compiled, batches()[1], second, whole.routed)
    gone = weakref.ref(first)
    del first
    gc.collect()
    assert gone() is None


def test_grad_modes_do_not_matter_to_the_memory_that_is_computed_in() -> None:
    pair = Pair()
    with torch.inference_mode():
        run_steps(pair.compiled, single_sequence_batch([5, 6], 4), new_cache(pair.compiled, 4), pair.routed)
    run_steps(pair.compiled, single_sequence_batch([5, 6], 4), new_cache(pair.compiled, 4), pair.routed)


def test_w_uk_is_held_twice_and_not_three_times(whole: Pair) -> None:
    assert whole.compiled._compiled is not None
    for layer in whole.compiled._compiled._layers:
        packed = [part for part in vars(layer.up).values() if isinstance(part, PackedMatrices)]
        assert sum(part.nbytes for part in packed) + layer.w_uk.nbytes == laid_out_bytes(
            32, 64, 3 * (32 + 64) * 64, torch.bfloat16
        )


def untouched_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on nothing but compiled programs may write a cache, or decode from it."""

    def never(*arguments: object) -> None:
        pytest.fail("torch was asked to write or to read a cache that programs know")

    for name in ("write", "read"):
        monkeypatch.setattr(LatentKVCache, name, never)
    for name in ("decode", "_decode"):
        monkeypatch.setattr(BlockwiseAttention, name, never)


@pytest.mark.parametrize("block_size", [4, 16])
@pytest.mark.parametrize("quantization", Quantization)
def test_a_quantized_cache_is_written_and_read_by_programs(
    whole: Pair, quantization: Quantization, block_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = random_tokens(131, 40, seed=2)
    sizes = [20, 14, *[1] * 6]
    expected = hf_logits(whole.reference, tokens)
    caches = [new_cache(model, 10, quantization, block_size) for model in (whole.plain, whole.compiled)]
    plain = in_parts(whole.plain, whole.routed, tokens, sizes, caches[0])
    untouched_by_torch(monkeypatch)
    logits = in_parts(whole.compiled, whole.routed, tokens, sizes, caches[1])
    monkeypatch.undo()
    assert usual_error(logits, expected) < 0.1
    assert usual_error(logits, expected) < 1.4 * usual_error(plain, expected)
    # The first layer's latents are of the same embeddings. A rounding before may take one a step of the cache further.
    assert relative_error(*(cache.gather(0, torch.arange(40)) for cache in caches)) < 0.02


@pytest.mark.parametrize("quantization", [None, *Quantization])
def test_a_batch_of_decodes_is_one_program_a_layer(
    whole: Pair, quantization: Quantization | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = prefilled(whole, 3, quantization)
    monkeypatch.setattr(whole.compiled._compiled, "shares_cores", True)
    calls: list[int] = []
    program = Lane.whole

    def watched(lane: Lane, layer: int, threads: int, with_mlp: bool) -> None:
        calls.append(layer)
        program(lane, layer, threads, with_mlp)

    monkeypatch.setattr(Lane, "whole", watched)
    for name in ("enter", "attend", "leave", "mlp"):
        monkeypatch.setattr(Lane, name, lambda *arguments: pytest.fail("a program of its own"))
    untouched_by_torch(monkeypatch)
    run_steps(whole.compiled, batches()[0], cache, whole.routed)
    assert calls == [0, 1, 2]


def test_caches_of_several_kinds_take_turns(whole: Pair) -> None:
    kinds = (None, *Quantization)
    expected = [run_steps(whole.compiled, batches()[0], prefilled(whole, 3, kind), whole.routed) for kind in kinds]
    caches = [prefilled(whole, 3, kind) for kind in kinds]
    for cache, logits in zip(caches, expected, strict=True):
        assert torch.equal(run_steps(whole.compiled, batches()[0], cache, whole.routed), logits)


@pytest.mark.parametrize("quantization", [None, *Quantization])
def test_blocks_that_programs_do_not_know_are_written_and_read_by_torch(
    whole: Pair, quantization: Quantization | None
) -> None:
    tokens = random_tokens(131, 40, seed=2)
    sizes = [20, 14, *[1] * 6]
    cache = new_cache(whole.compiled, 1, quantization, block_size=300)
    logits = in_parts(whole.compiled, whole.routed, tokens, sizes, cache)
    assert usual_error(logits, hf_logits(whole.reference, tokens)) < 0.1


@pytest.mark.parametrize("quantization", [None, *Quantization])
def test_a_token_that_is_not_finite_spoils_its_own_sequence_alone(
    whole: Pair, quantization: Quantization | None
) -> None:
    cache = prefilled(whole, 3, quantization)
    expected = run_steps(whole.compiled, batches()[0], cache, whole.routed)
    cache.data[0, TABLES[0][0], 1, :8].view(torch.uint8).fill_(0xFF)
    logits = run_steps(whole.compiled, batches()[0], cache, whole.routed)
    assert bool(logits[0].isnan().all())
    assert torch.equal(logits[1], expected[1])


@pytest.mark.parametrize(
    "odd",
    [
        {"attention_bias": True},
        {"kv_lora_rank": 48},
        {"v_head_dim": 32},
        {"qk_rope_head_dim": 24},
        {"n_routed_experts": 24},
        {"moe_intermediate_size": 40},
        {"q_lora_rank": 24},
    ],
)
def test_models_of_other_shapes_keep_their_modules(odd: dict[str, object]) -> None:
    pair = Pair(**odd)
    assert not pair.compiled.is_compiled
    tokens = random_tokens(131, 20, seed=2)
    logits = in_parts(pair.compiled, pair.routed, tokens, [12, 1, 7], new_cache(pair.compiled, 5))
    assert relative_error(logits, hf_logits(pair.reference, tokens)) < 0.04
