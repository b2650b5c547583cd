"""Makes the small checkpoint that comes with the package: DeepSeek-V2's shape with every branch, random weights.

Usage: .venv/bin/python tools/make_demo_checkpoint.py deploy/models/shoal-demo

The tokenizer is trained on the documentation inside Python's standard library, so its merges depend on the Python
version; the weights depend on the seed alone.
"""

import ast
import json
import pydoc_data.topics
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from model_shards.config import ModelConfig, load_model_config
from model_shards.weights.check import expected_shapes
from training.tokenizer import BOS_ID, EOS_ID, train_tokenizer, write_tokenizer

SEED = 2
CONFIG: dict[str, object] = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 192,
    "initializer_range": 0.02,
    "intermediate_size": 512,
    "kv_lora_rank": 64,
    "max_position_embeddings": 16384,
    "model_type": "deepseek_v2",
    "moe_intermediate_size": 64,
    "moe_layer_freq": 1,
    "n_group": 4,
    "n_routed_experts": 16,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 8,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 8,
    "q_lora_rank": 96,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 4,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.0,
    "scoring_func": "softmax",
    "tie_word_embeddings": False,
    "topk_group": 2,
    "topk_method": "group_limited_greedy",
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "v_head_dim": 32,
    "vocab_size": 8192,
}
GENERATION_CONFIG: dict[str, object] = {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID}
MODEL_CARD = f"""# shoal-demo

The checkpoint that `shoal serve` uses when none is named: DeepSeek-V2's shape, small enough to come with the package.

- Weights are random for now: it shows that a cell works, its answers mean nothing.
- It has every branch of DeepSeek-V2: low-rank queries, latent KV, group-limited gating over 16 experts in 4 groups
  (4 per token, from 2 groups), 2 shared experts, a dense first layer, YaRN with mscale.
- The tokenizer is a byte-level BPE of 8192 tokens, trained on the documentation of Python's standard library; the chat
  format is DeepSeek-V2's.
- transformers loads it unchanged.

Made by `tools/make_demo_checkpoint.py` with seed {SEED}.
"""


def training_text() -> Iterator[str]:
    """Docstrings of the standard library's top-level modules, in the order of their names, and the language topics."""
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                docstring = ast.get_docstring(node)
                if docstring:
                    yield docstring
    yield from pydoc_data.topics.topics.values()


def random_weights(config: ModelConfig) -> dict[str, torch.Tensor]:
    """bf16 tensors by Hugging Face name, at the scale of a trained model, with a router that tells experts apart."""
    generator = torch.Generator().manual_seed(SEED)
    weights: dict[str, torch.Tensor] = {}
    for name, shape in sorted(expected_shapes(config).items()):
        noise = torch.randn(shape, generator=generator)
        if "norm" in name:
            tensor = 1 + 0.1 * noise
        elif "embed_tokens" in name:
            tensor = noise
        elif name.endswith("gate.weight"):
            tensor = noise * 4 / config.hidden_size**0.5
        else:
            tensor = noise / shape[-1] ** 0.5
        weights[name] = tensor.to(torch.bfloat16)
    return weights


def make_checkpoint(directory: Path) -> None:
    """Writes a Hugging Face directory."""
    directory.mkdir(parents=True, exist_ok=True)
    _write_json(directory / "config.json", CONFIG)
    _write_json(directory / "generation_config.json", GENERATION_CONFIG)
    config = load_model_config(directory)
    tokenizer = train_tokenizer(training_text(), config.vocab_size)
    write_tokenizer(tokenizer, directory, config.max_position_embeddings)
    weights = directory / "model.safetensors"
    save_file(random_weights(config), weights, metadata={"format": "pt"})
    weights.chmod(0o644)  # save_file lets its owner alone read it; an image is built by one user and run by another
    (directory / "README.md").write_text(MODEL_CARD, encoding="utf-8")


def _write_json(file: Path, values: dict[str, object]) -> None:
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    make_checkpoint(Path(sys.argv[1]))
