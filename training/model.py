"""The demonstration model: DeepSeek-V2's shape with every branch, small enough to train on a CPU."""

import torch
from torch import nn
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

INITIALIZER_RANGE = 0.02


def demo_config(vocab_size: int, bos_token_id: int, eos_token_id: int) -> DeepseekV2Config:
    """Every branch of the big model: q_lora, groups of experts, a dense first layer, YaRN, a scaling factor."""
    return DeepseekV2Config(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=768,
        moe_intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        q_lora_rank=128,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        n_routed_experts=16,
        n_shared_experts=2,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        topk_method="group_limited_greedy",
        routed_scaling_factor=2.0,
        norm_topk_prob=False,
        first_k_dense_replace=1,
        moe_layer_freq=1,
        max_position_embeddings=16384,
        initializer_range=INITIALIZER_RANGE,
        rms_norm_eps=1e-6,
        attention_bias=False,
        attention_dropout=0.0,
        tie_word_embeddings=False,
        bos_token_id=bos_token_id,
        eos_token_id=eos_token_id,
        use_cache=False,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
        },
    )


@torch.no_grad()
def build_model(config: DeepseekV2Config, seed: int) -> DeepseekV2ForCausalLM:
    """float32 parameters that depend on the seed alone: normal of std `initializer_range`, norms 1, biases 0.

    Experts run as transformers' plain loop: on a CPU its grouped_mm takes several times as long to go backward.
    """
    model: DeepseekV2ForCausalLM = DeepseekV2ForCausalLM._from_config(
        config, attn_implementation="sdpa", experts_implementation="eager", dtype=torch.float32
    )
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.ones_(parameter)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
        else:
            nn.init.normal_(parameter, std=config.initializer_range, generator=generator)
    return model
