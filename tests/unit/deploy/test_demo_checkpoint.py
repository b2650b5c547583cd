"""The checkpoint that comes with the package: small, whole, of DeepSeek-V2's shape; its logits are transformers'."""

import json
from functools import cache

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer, DeepseekV2ForCausalLM

from deploy.models import default_model_directory
from deploy.text import ChatMessage, ChatTokenizer
from model_shards.config import load_model_config
from model_shards.kv_cache import LatentKVCache
from model_shards.weights import check_checkpoint, load_attention_model, load_expert_shard
from tests.reference import (
    CPU,
    ShardExperts,
    hf_logits,
    random_tokens,
    relative_error,
    run_steps,
    single_sequence_batch,
)
from tools.make_demo_checkpoint import CONFIG, GENERATION_CONFIG, MODEL_CARD, random_weights
from training.tokenizer import CHAT_TEMPLATE
from training.tokenizer import tokenizer_config as made_tokenizer_config

DIRECTORY = default_model_directory()
MODEL_CONFIG = load_model_config(DIRECTORY)


@cache
def reference() -> DeepseekV2ForCausalLM:
    """The checkpoint in transformers, in float32."""
    model = DeepseekV2ForCausalLM.from_pretrained(DIRECTORY, dtype=torch.float32).eval()
    return model.requires_grad_(False)


def our_logits(token_ids: list[int]) -> torch.Tensor:
    """The same tokens through this package: a prefill but for the last token, which is decoded."""
    model = load_attention_model(DIRECTORY, MODEL_CONFIG, torch.float32, CPU)
    experts = tuple(range(MODEL_CONFIG.n_routed_experts or 0))
    routed = ShardExperts(load_expert_shard(DIRECTORY, MODEL_CONFIG, experts, torch.float32, CPU))
    kv_cache = LatentKVCache(MODEL_CONFIG, -(-len(token_ids) // 16), 16, torch.float32, CPU)
    prefilled = run_steps(model, single_sequence_batch(token_ids[:-1], 16), kv_cache, routed)
    last = single_sequence_batch(token_ids[-1:], 16, start=len(token_ids) - 1, decode=True)
    return torch.cat((prefilled, run_steps(model, last, kv_cache, routed)))


def test_it_fits_in_the_package() -> None:
    files = [file for file in DIRECTORY.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 20e6
    assert all(file.stat().st_mode & 0o444 == 0o444 for file in files)  # whoever runs the service may read it


def test_it_holds_every_tensor_of_its_config_and_no_other() -> None:
    check_checkpoint(DIRECTORY, MODEL_CONFIG)


def test_it_has_every_branch_of_deepseek_v2() -> None:
    config = MODEL_CONFIG
    assert config.q_lora_rank is not None
    assert config.topk_method == "group_limited_greedy"
    assert 1 < config.topk_group < config.n_group
    assert config.n_routed_experts is not None
    assert config.num_experts_per_tok < config.n_routed_experts
    assert config.n_shared_experts == 2
    assert config.routed_scaling_factor != 1
    assert 0 < config.first_k_dense_replace < config.num_hidden_layers
    assert len(config.moe_layers) >= 2
    assert config.rope.yarn is not None
    assert config.rope.yarn.factor > 1
    assert config.rope.yarn.mscale == config.rope.yarn.mscale_all_dim == 0.707
    # The stretched positions can be reached.
    assert config.max_position_embeddings > config.rope.yarn.original_max_position_embeddings
    # Keys and values differ in width from what is cached, so that a mix-up cannot pass.
    assert config.qk_nope_head_dim + config.qk_rope_head_dim != config.v_head_dim


def test_its_logits_are_those_of_transformers() -> None:
    prompt = ChatTokenizer.load(DIRECTORY).render_chat([ChatMessage("user", "What does a dictionary do? 😀")])
    token_ids = [*prompt, *random_tokens(MODEL_CONFIG.vocab_size, 80, seed=5)]
    assert relative_error(our_logits(token_ids), hf_logits(reference(), token_ids)) < 1e-4


def test_its_weights_are_bfloat16_and_its_router_prefers_no_expert_to_all_others() -> None:
    state = load_file(DIRECTORY / "model.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    assert all(tensor.isfinite().all() for tensor in state.values())
    model = reference()
    chosen: list[torch.Tensor] = []
    gates = [model.model.layers[layer].mlp.gate for layer in MODEL_CONFIG.moe_layers]
    hooks = [gate.register_forward_hook(lambda _gate, _inputs, output: chosen.append(output[-1])) for gate in gates]
    hf_logits(model, random_tokens(MODEL_CONFIG.vocab_size, 200, seed=6))
    for hook in hooks:
        hook.remove()
    assert len(chosen) == len(gates)
    for ids in chosen:
        counts = torch.bincount(ids.flatten(), minlength=MODEL_CONFIG.n_routed_experts or 0)
        assert (counts > 0).all()
        assert counts.max() < 200


def test_transformers_finds_config_and_tokenizer_by_the_directory_alone() -> None:
    assert AutoConfig.from_pretrained(DIRECTORY).model_type == "deepseek_v2"
    text = "def f(x):\n    return 12 * x  # é 😀"
    tokenizer = ChatTokenizer.load(DIRECTORY)
    assert AutoTokenizer.from_pretrained(DIRECTORY).encode(text) == tokenizer.encode(text)


def test_tokenizer_and_model_agree_on_the_vocabulary_and_the_special_tokens() -> None:
    tokenizer = ChatTokenizer.load(DIRECTORY)
    assert tokenizer.vocab_size == MODEL_CONFIG.vocab_size
    assert tokenizer.bos_token_id == MODEL_CONFIG.bos_token_id
    assert tokenizer.eos_token_ids == MODEL_CONFIG.eos_token_ids


def test_the_tool_makes_these_files() -> None:
    made = {
        "config.json": CONFIG,
        "generation_config.json": GENERATION_CONFIG,
        "tokenizer_config.json": made_tokenizer_config(MODEL_CONFIG.max_position_embeddings),
    }
    for name, values in made.items():
        assert json.loads((DIRECTORY / name).read_text(encoding="utf-8")) == values, name
    assert (DIRECTORY / "README.md").read_text(encoding="utf-8") == MODEL_CARD
    assert made["tokenizer_config.json"]["chat_template"] == CHAT_TEMPLATE
    stored = load_file(DIRECTORY / "model.safetensors")
    weights = random_weights(MODEL_CONFIG)
    assert stored.keys() == weights.keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in weights.items())
