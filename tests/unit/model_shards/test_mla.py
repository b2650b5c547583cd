"""Expanded and absorbed attention give equal results on every core, however contexts are cut, grouped and padded."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model_shards import attention_plan, blockwise_attention, fused_attention
from model_shards.attention_plan import CPU_LIMITS, DEVICE_LIMITS, GroupLimits, group_by_length, plan_attention
from model_shards.fused_attention import FusedAttention
from model_shards.kernels.decode_attention import can_decode
from model_shards.kv_cache import LatentKVCache
from model_shards.model import AttentionModel
from model_shards.quantization import Quantization
from tests.reference import (
    CPU,
    YARN_ROPE,
    Chunk,
    ShardExperts,
    attention_model_of,
    build_batch,
    expert_shard_of,
    make_hf_config,
    random_hf_model,
    random_tokens,
    relative_error,
    run_steps,
    single_sequence_batch,
)

REFERENCE = random_hf_model(make_hf_config(q_lora_rank=24, rope_parameters=YARN_ROPE), seed=11)
ROUTED = ShardExperts(expert_shard_of(REFERENCE))


def model_on(core: str) -> AttentionModel:
    """The same weights; what a GPU would compute with runs on a CPU too."""
    model = attention_model_of(REFERENCE)
    for layer in model.model.decoder_layers:
        if core == "fused":
            layer.self_attn._core = FusedAttention(model.config)
        layer.self_attn.lay_out_up_projections()
    return model


MODELS = {core: model_on(core) for core in ("blockwise", "fused")}
MODEL = MODELS["blockwise"]
every_core = pytest.mark.parametrize("model", [pytest.param(MODELS[core], id=core) for core in MODELS])


def new_cache(num_blocks: int) -> LatentKVCache:
    return LatentKVCache(MODEL.config, num_blocks, 4, torch.float32, CPU)


@every_core
@pytest.mark.parametrize("context", [1, 2, 4, 5, 30])
def test_absorbed_equals_expanded_for_the_same_token(model: AttentionModel, context: int) -> None:
    tokens = random_tokens(131, context, seed=context)
    cache = new_cache(8)
    if context > 1:
        run_steps(model, single_sequence_batch(tokens[:-1], 4), cache, ROUTED)
    expanded = run_steps(MODELS["fused"], single_sequence_batch(tokens[-1:], 4, start=context - 1), cache, ROUTED)
    absorbed = run_steps(model, single_sequence_batch(tokens[-1:], 4, start=context - 1, decode=True), cache, ROUTED)
    assert relative_error(absorbed, expanded) < 1e-5


def test_weights_laid_out_once_or_at_each_call_give_the_same() -> None:
    batch = single_sequence_batch(random_tokens(131, 20, seed=1), 4)
    before = run_steps(attention_model_of(REFERENCE), batch, new_cache(5), ROUTED)
    assert torch.equal(before, run_steps(MODEL, batch, new_cache(5), ROUTED))


@pytest.mark.parametrize("q_lora_rank", [None, 24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_gpu_computes_with_serves_matrices_in_8_bits_too(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, q_lora_rank: int | None
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)  # no layouts
    reference = random_hf_model(make_hf_config(q_lora_rank=q_lora_rank), seed=4)
    routed, batch = ShardExperts(expert_shard_of(reference, dtype=dtype)), single_sequence_batch([3, 1, 4, 1, 5], 4)
    logits = []
    for in_int8 in (False, True):
        model = attention_model_of(reference, dtype)
        for layer in model.model.decoder_layers:
            layer.self_attn._core = FusedAttention(model.config)
        model.lay_out(in_int8)
        logits.append(run_steps(model, batch, LatentKVCache(model.config, 2, 4, dtype, CPU), routed))
    assert 1e-4 < relative_error(logits[1], logits[0]) < 0.06


@pytest.mark.parametrize("limit", [1, 1 << 10, 1 << 28])
def test_expanding_a_few_heads_at_a_time_changes_nothing(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = random_tokens(131, 20, seed=1)
    expected = run_steps(MODELS["fused"], single_sequence_batch(tokens, 4), new_cache(5), ROUTED)
    monkeypatch.setattr(fused_attention, "_EXPANDED_ELEMENTS_LIMIT", limit)
    actual = run_steps(MODELS["fused"], single_sequence_batch(tokens, 4), new_cache(5), ROUTED)
    assert relative_error(actual, expected) < 1e-5


# With kv_lora_rank 32 a chunk of up to 24 tokens on a long context is absorbed, a longer one expanded.
@pytest.mark.parametrize("sizes", [[90], [1, 89], [40, 50], [70, 20], [64, 8, 8, 10], [3] * 30])
@pytest.mark.parametrize(("block", "tile", "keys"), [(8, 4, 16), (16, 16, 16), (7, 3, 5), (32, 8, 4096)])
def test_blocks_of_any_size_and_chunks_of_any_size_give_the_whole_prompts_logits(
    sizes: list[int], block: int, tile: int, keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = random_tokens(131, 90, seed=2)
    expected = run_steps(MODELS["fused"], single_sequence_batch(tokens, 4), new_cache(23), ROUTED)
    monkeypatch.setattr(blockwise_attention, "_PREFILL_BLOCK", block)
    monkeypatch.setattr(blockwise_attention, "_TILE", tile)
    monkeypatch.setattr(blockwise_attention, "_EXPANDED_KEYS", keys)
    cache, start, parts = new_cache(23), 0, []
    for size in sizes:
        parts.append(run_steps(MODEL, single_sequence_batch(tokens[start:][:size], 4, start), cache, ROUTED))
        start += size
    assert relative_error(torch.cat(parts), expected) < 1e-5


@every_core
@pytest.mark.parametrize("block", [3, 8, 512])
def test_decodes_in_several_groups_and_blocks_equal_decodes_in_one(
    model: AttentionModel, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = (3, 21, 2, 9, 20)
    prompts = [random_tokens(131, length, seed=length) for length in lengths]
    # Blocks that lie together, and blocks that do not.
    tables = [[31], [6, 7, 8, 9, 10, 11], [0], [29, 28, 27], [12, 1, 14, 15, 2]]
    cache = new_cache(32)
    run_steps(MODEL, build_batch([Chunk(p[:-1], 0, t) for p, t in zip(prompts, tables, strict=True)], 4), cache, ROUTED)
    decodes = build_batch([Chunk(p[-1:], len(p) - 1, t, decode=True) for p, t in zip(prompts, tables, strict=True)], 4)
    together = run_steps(MODELS["fused"], decodes, cache, ROUTED)
    for limits in (CPU_LIMITS, GroupLimits(0, 25)):
        monkeypatch.setattr(attention_plan, "CPU_LIMITS", limits)
        monkeypatch.setattr(blockwise_attention, "_DECODE_BLOCK", block)
        assert (len(plan_attention(decodes, 4).decodes) > 1) == (limits is not CPU_LIMITS)
        assert relative_error(run_steps(model, decodes, cache, ROUTED), together) < 1e-5


DENSE = random_hf_model(make_hf_config(q_lora_rank=24, rope_parameters=YARN_ROPE, first_k_dense_replace=3), seed=12)


@pytest.mark.parametrize(
    "compiled",
    [
        False,
        pytest.param(
            True,
            marks=pytest.mark.skipif(
                not can_decode(LatentKVCache(MODEL.config, 1, 4, torch.bfloat16, CPU)),
                reason="a CPU without AVX512_BF16",
            ),
        ),
    ],
)
@pytest.mark.parametrize("quantization", [None, *Quantization])
@pytest.mark.parametrize("sizes", [[90], [64, 8, 8, 10], [60] + [1] * 30])
def test_in_bfloat16_chunks_and_decodes_give_the_whole_prompts_logits_up_to_rounding(
    sizes: list[int], quantization: Quantization | None, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(blockwise_attention, "can_decode", lambda cache: False)
    model = attention_model_of(DENSE, torch.bfloat16)
    model.lay_out()
    tokens = random_tokens(131, 90, seed=2)
    expected = run_steps(attention_model_of(DENSE), single_sequence_batch(tokens, 4), new_cache(23), ROUTED)
    cache, start, parts = LatentKVCache(model.config, 23, 4, torch.bfloat16, CPU, quantization), 0, []
    for size in sizes:
        batch = single_sequence_batch(tokens[start:][:size], 4, start, decode=size == 1)
        parts.append(run_steps(model, batch, cache, ROUTED))
        start += size
    assert relative_error(torch.cat(parts), expected) < (0.03 if quantization is None else 0.06)


def test_decodes_of_one_length_keep_their_order_and_have_no_padding() -> None:
    batch = build_batch([Chunk([1], 5, [2 * i, 2 * i + 1], decode=True) for i in range(3)], 4)
    plan = plan_attention(batch, 4)
    assert plan.decode_order is None
    assert [group.padding for group in plan.decodes] == [None]
    unequal = build_batch([Chunk([1], 5, [0, 1], decode=True), Chunk([1], 2, [2], decode=True)], 4)
    order = plan_attention(unequal, 4).decode_order
    assert order is not None
    assert order.tolist() == [1, 0]


@pytest.mark.parametrize(("table", "run"), [([3, 4, 5], 12), ([3, 5, 4], None), ([5], 20)])
def test_slots_that_lie_together_are_known_by_their_first(table: list[int], run: int | None) -> None:
    (group,) = plan_attention(build_batch([Chunk([1], 4 * len(table) - 2, table, decode=True)], 4), 4).decodes
    assert group.run == run


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(1, 1000) | st.integers(1, 200_000), max_size=40), st.sampled_from([CPU_LIMITS, DEVICE_LIMITS])
)
def test_every_decode_is_in_one_group_and_padding_is_bounded(lengths: list[int], limits: GroupLimits) -> None:
    groups = group_by_length(tuple(lengths), limits)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for group in groups:
        longest = max(lengths[index] for index in group)
        held = sum(lengths[index] for index in group)
        assert len(group) == 1 or longest * len(group) <= min(max(2 * held, limits.tolerated), limits.gathered)


def test_slots_past_a_context_repeat_its_own_last_slot() -> None:
    #   sequence 0: blocks 3 1, context 5    slots 12 13 14 15 4
    #   sequence 1: block 2, context 2       slots 8 9, then its last one
    batch = build_batch([Chunk([1], 4, [3, 1], decode=True), Chunk([1], 1, [2], decode=True)], 4)
    (group,) = plan_attention(batch, 4).decodes
    assert group.padding is not None
    rows = dict(zip(group.rows.tolist(), group.slots.tolist(), strict=True))
    padding = dict(zip(group.rows.tolist(), group.padding.tolist(), strict=True))
    assert rows == {0: [12, 13, 14, 15, 4], 1: [8, 9, 9, 9, 9]}
    assert padding == {0: [False] * 5, 1: [False, False, True, True, True]}


def test_a_chunk_sees_its_context_and_no_later_token() -> None:
    batch = build_batch([Chunk([1, 2], 1, [5]), Chunk([1, 2, 3], 0, [6])], 4)
    later, first = plan_attention(batch, 4).prefills
    assert (later.start, later.stop, later.slots.tolist()) == (0, 2, [20, 21, 22])
    assert later.visible is not None
    assert later.visible.tolist() == [[True, True, False], [True, True, True]]
    assert (first.start, first.stop, first.visible) == (2, 5, None)
