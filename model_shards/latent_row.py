"""How many bytes the cache keeps of a token in one layer. Arithmetic only, without torch.

    plain       [ kv_c : R elements | k_pe : O elements ]                       in the model's dtype
    quantized   [ scale_inv : 4 bytes | k_pe : O elements | kv_c : R bytes | 0 to 3 unused ]

R kv_lora_rank, O qk_rope_head_dim. A quantized row begins and ends at a multiple of 4 bytes, where a float32 may lie.
"""

from model_shards.config import ModelConfig

SCALE_BYTES = 4


def row_bytes(config: ModelConfig, element_bytes: int, quantized: bool) -> int:
    """Of a model whose dtype has `element_bytes`."""
    if not quantized:
        return config.latent_dim * element_bytes
    used = SCALE_BYTES + config.qk_rope_head_dim * element_bytes + config.kv_lora_rank
    return -(-used // SCALE_BYTES) * SCALE_BYTES
