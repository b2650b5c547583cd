"""Logits held to transformers in float32, on a configuration for every branch of the model."""

import pytest
import torch

from model_shards.kv_cache import LatentKVCache
from tests.reference import (
    CPU,
    PLAIN_ROPE,
    YARN_ROPE,
    Chunk,
    DirectExperts,
    ShardExperts,
    attention_model_of,
    build_batch,
    chunks_of,
    expert_shard_of,
    hf_logits,
    make_hf_config,
    published_state_dict,
    random_hf_model,
    random_tokens,
    relative_error,
    run_steps,
    single_sequence_batch,
)

TOLERANCE = 1e-4
GROUPED = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 16.0}
SHORT_YARN = {**YARN_ROPE, "factor": 4.0, "original_max_position_embeddings": 16}

BRANCHES: dict[str, dict[str, object]] = {
    "plain": {},
    "q_lora": {"q_lora_rank": 24},
    "attention_bias": {"attention_bias": True},
    "attention_bias with q_lora": {"attention_bias": True, "q_lora_rank": 24},
    "group_limited_greedy": GROUPED,
    "one group": {**GROUPED, "n_group": 1, "topk_group": 1},
    "norm_topk_prob": {"norm_topk_prob": True, "routed_scaling_factor": 16.0},
    "norm_topk_prob with groups": {**GROUPED, "norm_topk_prob": True},
    "norm_topk_prob with one expert per token": {
        "norm_topk_prob": True,
        "num_experts_per_tok": 1,
        "routed_scaling_factor": 2.0,
    },
    "yarn": {"rope_parameters": SHORT_YARN},
    "yarn with other mscale": {"rope_parameters": {**SHORT_YARN, "mscale": 1.0, "mscale_all_dim": 0.5}},
    "yarn without mscale": {
        "rope_parameters": {key: value for key, value in SHORT_YARN.items() if not key.startswith("mscale")}
    },
    "yarn without stretching": {"rope_parameters": {**SHORT_YARN, "factor": 1.0}},
    "another rope_theta": {"rope_parameters": {**PLAIN_ROPE, "rope_theta": 500.0}},
    "moe_layer_freq 2": {"moe_layer_freq": 2, "num_hidden_layers": 4},
    "first_k_dense_replace 0": {"first_k_dense_replace": 0},
    "first_k_dense_replace 2": {"first_k_dense_replace": 2},
    "no routed layer": {"first_k_dense_replace": 3},
    "no routed experts": {"n_routed_experts": None},
    "no shared experts": {"n_shared_experts": None},
    "one shared expert": {"n_shared_experts": 1},
    "tied embeddings": {"tie_word_embeddings": True},
    "values wider than keys": {"v_head_dim": 32},
    "another rms_norm_eps": {"rms_norm_eps": 1e-2, "q_lora_rank": 24},
    "the whole of V2": {**GROUPED, "q_lora_rank": 24, "rope_parameters": SHORT_YARN},
}


@pytest.mark.parametrize("branch", BRANCHES)
def test_prefill_and_decode_logits_equal_those_of_transformers(branch: str) -> None:
    reference = random_hf_model(make_hf_config(**BRANCHES[branch]), seed=1)
    tokens = random_tokens(reference.config.vocab_size, 40, seed=2)
    expected = hf_logits(reference, tokens)
    model = attention_model_of(reference)
    routed = DirectExperts(published_state_dict(reference))
    cache = LatentKVCache(model.config, 10, 4, torch.float32, CPU)

    prefilled = run_steps(model, single_sequence_batch(tokens[:36], 4), cache, routed)
    decoded = [
        run_steps(model, single_sequence_batch([token], 4, start=36 + index, decode=True), cache, routed)
        for index, token in enumerate(tokens[36:])
    ]

    assert relative_error(prefilled, expected[:36]) < TOLERANCE
    assert relative_error(torch.cat(decoded), expected[36:]) < TOLERANCE
    assert {layer for layer, _ in routed.calls} == set(model.config.moe_layers)


def test_logits_beyond_position_4096_under_yarn_equal_those_of_transformers() -> None:
    config = make_hf_config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=163840,
        rope_parameters=YARN_ROPE,
    )
    reference = random_hf_model(config, seed=3)
    tokens = random_tokens(config.vocab_size, 4500, seed=4)
    expected = hf_logits(reference, tokens)
    model = attention_model_of(reference)
    routed = ShardExperts(expert_shard_of(reference))
    cache = LatentKVCache(model.config, 71, 64, torch.float32, CPU)

    chunks = [
        run_steps(model, single_sequence_batch(chunk, 64, start), cache, routed)
        for start, chunk in chunks_of(tokens[:-4], 1000)
    ]
    decodes = [
        run_steps(model, single_sequence_batch([tokens[i]], 64, i, decode=True), cache, routed)
        for i in range(4496, 4500)
    ]

    assert relative_error(torch.cat(chunks)[4096:], expected[4096:4496]) < TOLERANCE
    assert relative_error(torch.cat(decodes), expected[4496:]) < TOLERANCE


@pytest.mark.parametrize("chunk", [1, 3, 7, 20])
def test_a_prompt_in_chunks_gives_the_logits_of_the_whole_prompt(chunk: int) -> None:
    reference = random_hf_model(make_hf_config(**BRANCHES["the whole of V2"]), seed=5)
    tokens = random_tokens(reference.config.vocab_size, 23, seed=6)
    model = attention_model_of(reference)
    routed = ShardExperts(expert_shard_of(reference))

    whole_cache = LatentKVCache(model.config, 6, 4, torch.float32, CPU)
    whole = run_steps(model, single_sequence_batch(tokens, 4), whole_cache, routed)
    chunked_cache = LatentKVCache(model.config, 6, 4, torch.float32, CPU)
    chunked = [
        run_steps(model, single_sequence_batch(part, 4, start), chunked_cache, routed)
        for start, part in chunks_of(tokens, chunk)
    ]

    assert relative_error(torch.cat(chunked), whole) < 1e-5
    assert relative_error(chunked_cache.data, whole_cache.data) < 1e-5


def test_sequences_sharing_a_batch_get_the_logits_they_get_alone() -> None:
    reference = random_hf_model(make_hf_config(**BRANCHES["the whole of V2"]), seed=7)
    vocab = reference.config.vocab_size
    prompts = [random_tokens(vocab, length, seed=length) for length in (9, 2, 17, 5, 12)]
    # Blocks are scattered and interleaved, and none of them is block 0, which pads the tables.
    tables = [[5, 11, 2], [7], [1, 14, 9, 3, 12], [13, 4], [6, 10, 8]]
    model = attention_model_of(reference)
    routed = ShardExperts(expert_shard_of(reference))
    cache = LatentKVCache(model.config, 15, 4, torch.float32, CPU)
    cache.data[:, 0] = float("nan")

    first = [Chunk(prompts[i][:-1], 0, tables[i]) for i in range(3)]
    run_steps(model, build_batch(first, 4), cache, routed)
    mixed = [Chunk(prompts[i][-1:], len(prompts[i]) - 1, tables[i], decode=True) for i in range(3)]
    mixed += [Chunk(prompts[3], 0, tables[3], all_logits=False), Chunk(prompts[4][:7], 0, tables[4], all_logits=False)]
    logits = run_steps(model, build_batch(mixed, 4), cache, routed)

    expected = [hf_logits(reference, prompt)[-1] for prompt in prompts[:4]]
    expected.append(hf_logits(reference, prompts[4][:7])[-1])
    assert logits.shape == (5, vocab)
    assert relative_error(logits, torch.stack(expected)) < TOLERANCE


def test_bfloat16_logits_are_finite_and_near_float32() -> None:
    reference = random_hf_model(make_hf_config(q_lora_rank=24, rope_parameters=SHORT_YARN), seed=8)
    tokens = random_tokens(reference.config.vocab_size, 30, seed=9)
    expected = hf_logits(reference, tokens)
    model = attention_model_of(reference, torch.bfloat16)
    routed = ShardExperts(expert_shard_of(reference, dtype=torch.bfloat16))
    cache = LatentKVCache(model.config, 8, 4, torch.bfloat16, CPU)

    prefilled = run_steps(model, single_sequence_batch(tokens[:29], 4), cache, routed)
    decoded = run_steps(model, single_sequence_batch(tokens[29:], 4, start=29, decode=True), cache, routed)

    logits = torch.cat((prefilled, decoded))
    assert logits.dtype == torch.float32
    assert logits.isfinite().all()
    assert relative_error(logits, expected) < 0.1
