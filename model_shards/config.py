"""The model's shape, read from a Hugging Face `config.json`; names are Hugging Face's."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RopeConfig:
    """Rotary settings, from `rope_scaling` (published checkpoints) or `rope_parameters` (transformers 5)."""

    theta: float
    # None for plain rotary embeddings; otherwise every YaRN field below is set.
    yarn: "YarnConfig | None"


@dataclass(frozen=True)
class YarnConfig:
    """YaRN (arXiv:2309.00071) as DeepSeek-V2 uses it."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float
    mscale: float
    mscale_all_dim: float


@dataclass(frozen=True)
class ModelConfig:
    """Shape of one `DeepseekV2ForCausalLM` checkpoint. Build it with `load_model_config`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    n_routed_experts: int | None  # None: a dense model
    n_shared_experts: int | None
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    topk_method: str  # "greedy" | "group_limited_greedy"
    routed_scaling_factor: float
    norm_topk_prob: bool
    first_k_dense_replace: int
    moe_layer_freq: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope: RopeConfig
    attention_bias: bool
    tie_word_embeddings: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    @property
    def latent_dim(self) -> int:
        """Cached elements of one token in one layer: `kv_lora_rank + qk_rope_head_dim`."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    def is_moe_layer(self, layer: int) -> bool:
        """Whether `layer` has routed experts (modeling_deepseek.py, DeepseekV2DecoderLayer)."""
        return (
            self.n_routed_experts is not None
            and layer >= self.first_k_dense_replace
            and layer % self.moe_layer_freq == 0
        )

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers with routed experts, ascending."""
        return tuple(layer for layer in range(self.num_hidden_layers) if self.is_moe_layer(layer))
