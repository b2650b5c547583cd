"""Writes a trained model as a Hugging Face directory, in the spelling of the published DeepSeek-V2 checkpoints."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

from model_shards.config import load_model_config
from model_shards.weights.check import check_checkpoint

_FILE_MODE = 0o644  # readable by whoever runs the service
# Fields whose names and meaning the published config.json shares with transformers' config.
_SHARED_FIELDS = (
    "attention_bias",
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "first_k_dense_replace",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "kv_lora_rank",
    "max_position_embeddings",
    "moe_intermediate_size",
    "n_group",
    "n_routed_experts",
    "n_shared_experts",
    "norm_topk_prob",
    "num_attention_heads",
    "num_experts_per_tok",
    "num_hidden_layers",
    "num_key_value_heads",
    "q_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "rms_norm_eps",
    "routed_scaling_factor",
    "tie_word_embeddings",
    "topk_group",
    "topk_method",
    "v_head_dim",
    "vocab_size",
)


def export_model(model: DeepseekV2ForCausalLM, directory: Path) -> None:
    """Writes config.json, generation_config.json and model.safetensors (bf16); other files there are left alone.

    Raises CheckpointError or ConfigError when what was written is not what the service loads.
    """
    directory.mkdir(parents=True, exist_ok=True)
    config = model.config
    _write_json(directory / "config.json", published_config(config))
    _write_json(
        directory / "generation_config.json", {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    )
    weights = directory / "model.safetensors"
    tensors = {
        name: tensor.to(device="cpu", dtype=torch.bfloat16).contiguous()
        for name, tensor in published_tensors(model.state_dict()).items()
    }
    save_file(tensors, weights, metadata={"format": "pt"})
    weights.chmod(_FILE_MODE)
    check_checkpoint(directory, load_model_config(directory))


def published_config(config: DeepseekV2Config) -> dict[str, object]:
    """config.json as DeepSeek publishes it. Raises ValueError for rotary settings other than YaRN."""
    rope = dict(config.rope_parameters)
    if rope.pop("rope_type") != "yarn":
        raise ValueError(f"rope_parameters must be of type yarn, got {config.rope_parameters}")
    theta = rope.pop("rope_theta")
    values: dict[str, object] = {name: getattr(config, name) for name in _SHARED_FIELDS}
    values |= {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "moe_layer_freq": 1,
        "rope_scaling": {"type": "yarn", **rope},
        "rope_theta": theta,
        "scoring_func": "softmax",
        "torch_dtype": "bfloat16",
        "use_cache": True,  # training turns it off; generation wants it
    }
    return dict(sorted(values.items()))


def published_tensors(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors under their published names: one for each expert and projection, where transformers holds them fused."""
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        prefix, _, last = name.rpartition(".")
        if last == "gate_up_proj":  # [E, 2 * I, H]: gate above up
            for expert, fused in enumerate(tensor):
                gate, up = fused.chunk(2)
                tensors[f"{prefix}.{expert}.gate_proj.weight"] = gate
                tensors[f"{prefix}.{expert}.up_proj.weight"] = up
        elif last == "down_proj":  # [E, H, I]
            for expert, down in enumerate(tensor):
                tensors[f"{prefix}.{expert}.down_proj.weight"] = down
        else:
            tensors[name] = tensor
    return tensors


def _write_json(path: Path, values: Mapping[str, object]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")
    path.chmod(_FILE_MODE)
