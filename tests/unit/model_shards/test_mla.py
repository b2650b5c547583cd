"""Expanded and absorbed attention give equal results, however contexts are cut, grouped and padded."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model_shards import attention_plan, mla
from model_shards.attention_plan import group_by_length, plan_attention
from model_shards.kv_cache import LatentKVCache
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
MODEL = attention_model_of(REFERENCE)
ROUTED = ShardExperts(expert_shard_of(REFERENCE))


def new_cache(num_blocks: int) -> LatentKVCache:
    return LatentKVCache(MODEL.config, num_blocks, 4, torch.float32, CPU)


@pytest.mark.parametrize("context", [1, 2, 4, 5, 30])
def test_absorbed_equals_expanded_for_the_same_token(context: int) -> None:
    tokens = random_tokens(131, context, seed=context)
    cache = new_cache(8)
    if context > 1:
        run_steps(MODEL, single_sequence_batch(tokens[:-1], 4), cache, ROUTED)
    expanded = run_steps(MODEL, single_sequence_batch(tokens[-1:], 4, start=context - 1), cache, ROUTED)
    absorbed = run_steps(MODEL, single_sequence_batch(tokens[-1:], 4, start=context - 1, decode=True), cache, ROUTED)
    assert relative_error(absorbed, expanded) < 1e-5


@pytest.mark.parametrize("limit", [1, 1 << 10, 1 << 28])
def test_expanding_a_few_heads_at_a_time_changes_nothing(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = random_tokens(131, 20, seed=1)
    expected = run_steps(MODEL, single_sequence_batch(tokens, 4), new_cache(5), ROUTED)
    monkeypatch.setattr(mla, "_EXPANDED_ELEMENTS_LIMIT", limit)
    assert relative_error(run_steps(MODEL, single_sequence_batch(tokens, 4), new_cache(5), ROUTED), expected) < 1e-5


def test_decodes_in_several_groups_equal_decodes_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = (3, 21, 2, 9, 20)
    prompts = [random_tokens(131, length, seed=length) for length in lengths]
    tables = [range(6 * i, 6 * i + 6) for i in range(5)]
    cache = new_cache(30)
    run_steps(MODEL, build_batch([Chunk(p[:-1], 0, t) for p, t in zip(prompts, tables, strict=True)], 4), cache, ROUTED)
    decodes = build_batch([Chunk(p[-1:], len(p) - 1, t, decode=True) for p, t in zip(prompts, tables, strict=True)], 4)
    together = run_steps(MODEL, decodes, cache, ROUTED)
    monkeypatch.setattr(attention_plan, "_PADDED_ROWS_TOLERATED", 0)
    monkeypatch.setattr(attention_plan, "_GATHERED_ROWS_LIMIT", 25)
    assert len(plan_attention(decodes, 4).decodes) > 1
    assert relative_error(run_steps(MODEL, decodes, cache, ROUTED), together) < 1e-5


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 200_000), max_size=40))
def test_every_decode_is_in_one_group_and_padding_is_bounded(lengths: list[int]) -> None:
    groups = group_by_length(tuple(lengths))
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for group in groups:
        longest = max(lengths[index] for index in group)
        held = sum(lengths[index] for index in group)
        assert len(group) == 1 or longest * len(group) <= min(max(2 * held, 16_384), 131_072)


def test_slots_past_a_context_repeat_its_own_last_slot() -> None:
    #   sequence 0: blocks 3 1, context 5    slots 12 13 14 15 4
    #   sequence 1: block 2, context 2       slots 8 9, then its last one
    batch = build_batch([Chunk([1], 4, [3, 1], decode=True), Chunk([1], 1, [2], decode=True)], 4)
    (group,) = plan_attention(batch, 4).decodes
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
