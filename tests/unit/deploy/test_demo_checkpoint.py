"""The checkpoint that comes with the package: small, whole, of DeepSeek-V2's shape; its logits are transformers'."""

import json
import re
from functools import cache

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer, DeepseekV2ForCausalLM

from deploy.models import default_model_directory
from deploy.text import ChatMessage, ChatTokenizer
from model_shards.config import load_model_config
from model_shards.kv_cache import LatentKVCache
from model_shards.weights import check_checkpoint, load_attention_model, load_expert_shard
from tests.demo_judge import read_exam
from tests.reference import (
    CPU,
    ShardExperts,
    hf_logits,
    random_tokens,
    relative_error,
    run_steps,
    single_sequence_batch,
)
from training.export import published_config
from training.model import demo_config
from training.recipe import Recipe
from training.tokenizer import BOS_ID, EOS_ID, answer_text, prompt_text
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
    assert (DIRECTORY / "model.safetensors").stat().st_size <= 20e6
    assert sum(file.stat().st_size for file in files) <= 21e6
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


def test_its_weights_are_bfloat16_and_no_expert_is_dead_or_does_most_of_the_work() -> None:
    state = load_file(DIRECTORY / "model.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    assert all(tensor.isfinite().all() for tensor in state.values())
    model = reference()
    chosen: dict[int, list[torch.Tensor]] = {layer: [] for layer in MODEL_CONFIG.moe_layers}
    hooks = [
        model.model.layers[layer].mlp.gate.register_forward_hook(
            lambda _gate, _inputs, output, layer=layer: chosen[layer].append(output[-1].flatten())
        )
        for layer in MODEL_CONFIG.moe_layers
    ]
    tokenizer = ChatTokenizer.load(DIRECTORY)
    for question in read_exam().taught:
        hf_logits(model, tokenizer.encode(prompt_text(question.question) + answer_text(question.expected)))
    for hook in hooks:
        hook.remove()
    experts = MODEL_CONFIG.n_routed_experts or 0
    for ids in chosen.values():
        shares = torch.bincount(torch.cat(ids), minlength=experts) / torch.cat(ids).numel()
        assert shares.min() > 0.2 / experts
        assert shares.max() < 3 / experts


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


def test_the_files_beside_the_weights_are_what_training_writes() -> None:
    config = demo_config(Recipe().vocab_size, BOS_ID, EOS_ID)
    made = {
        "config.json": published_config(config),
        "generation_config.json": {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID},
        "tokenizer_config.json": made_tokenizer_config(MODEL_CONFIG.max_position_embeddings),
    }
    for name, values in made.items():
        assert json.loads((DIRECTORY / name).read_text(encoding="utf-8")) == values, name


def test_the_card_names_its_sources_and_shows_its_pictures() -> None:
    card = (DIRECTORY / "README.md").read_text(encoding="utf-8")
    for named in ("WordNet", "GeoNames", "CC BY 4.0", "make train-demo-model", "memorized", "held-out"):
        assert named in card
    for picture in re.findall(r"\]\((\S+\.png)\)", card):
        assert (DIRECTORY / picture).read_bytes().startswith(b"\x89PNG")
    assert card.count(".png)") == 2
