"""A prompt far beyond YaRN's original context, prefilled in chunks: its logits are the reference's, and what a chunk
allocates does not grow with the context before it, but for a few numbers a token."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.long_context_reference import sampled_reference
from model_shards.kv_cache import LatentKVCache
from tests.reference import (
    CPU,
    YARN_ROPE,
    ShardExperts,
    attention_model_of,
    chunks_of,
    expert_shard_of,
    make_hf_config,
    random_hf_model,
    random_tokens,
    relative_error,
    run_steps,
    single_sequence_batch,
)

TOKENS, CHUNK = 11_000, 512
HF_CONFIG = make_hf_config(q_lora_rank=24, rope_parameters=YARN_ROPE, max_position_embeddings=163_840)
HF_MODEL = random_hf_model(HF_CONFIG, seed=31)
MODEL = attention_model_of(HF_MODEL)
ROUTED = ShardExperts(expert_shard_of(HF_MODEL))
TOKEN_IDS = random_tokens(131, TOKENS, seed=32)


def allocated_at_once(start: int, cache: LatentKVCache) -> int:
    """Bytes: the most that the chunk at `start` holds beside what was there before it."""
    batch = single_sequence_batch(TOKEN_IDS[start : start + CHUNK], 16, start, all_logits=False)
    run_steps(MODEL, batch, cache, ROUTED)  # scratch has its size now
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run_steps(MODEL, batch, cache, ROUTED)
    assert profiled.profiler is not None
    assert profiled.profiler.kineto_results is not None
    changes = sorted(
        (event.start_ns(), event.nbytes())
        for event in profiled.profiler.kineto_results.events()
        if event.name() == "[memory]"
    )
    held = most = 0
    for _, change in changes:
        held += change
        most = max(most, held)
    return most


@pytest.fixture(scope="module")
def prefilled() -> tuple[LatentKVCache, dict[int, torch.Tensor]]:
    """The cache of the whole prompt, and logits by position."""
    cache = LatentKVCache(MODEL.config, -(-TOKENS // 16), 16, torch.float32, CPU)
    logits = {}
    for start, tokens in chunks_of(TOKEN_IDS, CHUNK):
        rows = run_steps(MODEL, single_sequence_batch(tokens, 16, start), cache, ROUTED)
        logits |= {start + offset: row for offset, row in enumerate(rows)}
    return cache, logits


def test_logits_at_sampled_positions_are_those_of_the_whole_context(
    prefilled: tuple[LatentKVCache, dict[int, torch.Tensor]],
) -> None:
    cache, logits = prefilled
    sampled = torch.tensor([0, 1, 511, 512, 1024, 4095, 4096, 4097, 7777, 10_239, 10_240, 10_751, 10_998, 10_999])
    reference = sampled_reference(MODEL, ROUTED, torch.tensor(TOKEN_IDS), sampled, cache, torch.arange(TOKENS))
    assert reference.latent_error < 1e-4
    for position, expected in zip(sampled.tolist(), reference.logits, strict=True):
        assert relative_error(logits[position], expected) < 1e-4, position


def test_what_a_chunk_allocates_does_not_grow_with_its_context(
    prefilled: tuple[LatentKVCache, dict[int, torch.Tensor]],
) -> None:
    cache, _ = prefilled
    near, far = (allocated_at_once(start, cache) for start in (1024, 9728))
    assert near > 100_000  # it was measured
    # The slots of the context, int64.
    assert far - near <= 16 * (9728 - 1024)


def test_scratch_does_not_grow_with_the_context(
    prefilled: tuple[LatentKVCache, dict[int, torch.Tensor]],
) -> None:
    cache, _ = prefilled
    config = MODEL.config
    expanded = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    assert cache.scratch_bytes <= 4 * (2 * 1024 * config.latent_dim + 4096 * expanded + 512 * 512)
