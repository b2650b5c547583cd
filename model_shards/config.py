"""The model's shape, read from a Hugging Face `config.json`; names are Hugging Face's."""

from dataclasses import dataclass
from pathlib import Path

from model_shards.json_keys import JsonKeys


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


ARCHITECTURE = "DeepseekV2ForCausalLM"
TOPK_METHODS = ("greedy", "group_limited_greedy")


def load_model_config(directory: Path) -> ModelConfig:
    """Reads `config.json` of a Hugging Face directory, and the stop tokens of its `generation_config.json`.

    Keys that fix a tensor's shape must stand in the file; the others default as in transformers' DeepseekV2Config.
    Raises CheckpointError, naming file, key and value, for a missing or invalid file, another architecture,
    and every setting that this package does not compute (quantization, other activations, other rotary types).
    """
    keys = JsonKeys.read(directory / "config.json")
    architectures = keys.raw("architectures")
    if architectures != [ARCHITECTURE]:
        raise keys.error("architectures", f'must be ["{ARCHITECTURE}"]')
    _refuse_unsupported(keys)
    config = ModelConfig(
        vocab_size=keys.positive("vocab_size"),
        hidden_size=keys.positive("hidden_size"),
        intermediate_size=keys.positive("intermediate_size"),
        moe_intermediate_size=keys.positive("moe_intermediate_size", 1407),
        num_hidden_layers=keys.positive("num_hidden_layers"),
        num_attention_heads=keys.positive("num_attention_heads"),
        q_lora_rank=keys.positive_or_none("q_lora_rank"),
        kv_lora_rank=keys.positive("kv_lora_rank"),
        qk_nope_head_dim=keys.positive("qk_nope_head_dim"),
        qk_rope_head_dim=keys.positive("qk_rope_head_dim"),
        v_head_dim=keys.positive("v_head_dim"),
        n_routed_experts=keys.positive_or_none("n_routed_experts"),
        n_shared_experts=keys.count_or_none("n_shared_experts"),
        num_experts_per_tok=keys.positive("num_experts_per_tok", 1),
        n_group=keys.positive("n_group", 1),
        topk_group=keys.positive("topk_group", 1),
        topk_method=keys.choice("topk_method", TOPK_METHODS, "greedy"),
        routed_scaling_factor=keys.number("routed_scaling_factor", 1.0),
        norm_topk_prob=keys.flag("norm_topk_prob"),
        first_k_dense_replace=keys.count("first_k_dense_replace", 0),
        moe_layer_freq=keys.positive("moe_layer_freq", 1),
        rms_norm_eps=_read_epsilon(keys),
        max_position_embeddings=keys.positive("max_position_embeddings", 2048),
        rope=_read_rope(keys),
        attention_bias=keys.flag("attention_bias"),
        tie_word_embeddings=keys.flag("tie_word_embeddings"),
        bos_token_id=keys.token("bos_token_id", 1),
        eos_token_ids=_read_eos(keys, directory / "generation_config.json"),
    )
    _check_shape(keys, config)
    return config


def _refuse_unsupported(keys: JsonKeys) -> None:
    if keys.raw("quantization_config") is not None:
        raise keys.error("quantization_config", "must be absent: quantized checkpoints are not supported")
    keys.choice("hidden_act", ("silu",), "silu")
    keys.choice("scoring_func", ("softmax",), "softmax")
    if keys.flag("mlp_bias"):
        raise keys.error("mlp_bias", "must be false: an MLP here has no bias")
    heads = keys.positive("num_attention_heads")
    if keys.positive("num_key_value_heads", heads) != heads:
        raise keys.error("num_key_value_heads", f"must equal num_attention_heads ({heads}): latents serve all heads")


def _check_shape(keys: JsonKeys, config: ModelConfig) -> None:
    """Rules between keys."""
    if config.qk_rope_head_dim % 2:
        raise keys.error("qk_rope_head_dim", "must be even: rotary dimensions turn in pairs")
    experts = config.n_routed_experts
    if not config.moe_layers or experts is None:
        return
    for key in ("num_experts_per_tok", "moe_intermediate_size"):
        if keys.raw(key) is None:
            raise keys.error(key, "is missing; a model with routed experts needs it")
    reachable = experts
    if config.topk_method == "group_limited_greedy":
        for key in ("n_group", "topk_group"):
            if keys.raw(key) is None:
                raise keys.error(key, "is missing; group_limited_greedy needs it")
        if experts % config.n_group:
            raise keys.error("n_group", f"must divide n_routed_experts ({experts})")
        if config.topk_group > config.n_group:
            raise keys.error("topk_group", f"must be at most n_group ({config.n_group})")
        reachable = experts // config.n_group * config.topk_group
    if config.num_experts_per_tok > reachable:
        raise keys.error("num_experts_per_tok", f"must be at most the {reachable} experts that a token may choose from")


def _read_epsilon(keys: JsonKeys) -> float:
    epsilon = keys.number("rms_norm_eps", 1e-6)
    if epsilon < 0:
        raise keys.error("rms_norm_eps", "must be 0 or above")
    return epsilon


def _read_eos(keys: JsonKeys, generation_config: Path) -> tuple[int, ...]:
    """Every token that ends a generation, config.json's first; transformers' default is 2."""
    eos = keys.tokens("eos_token_id", (2,))
    if generation_config.exists():
        eos += JsonKeys.read(generation_config).tokens("eos_token_id", ())
    return tuple(dict.fromkeys(eos))


def _read_rope(keys: JsonKeys) -> RopeConfig:
    """Either spelling; `rope_parameters` may hold the base itself, `rope_scaling` stands beside a `rope_theta`."""
    spelled = {name: keys.section(name) for name in ("rope_parameters", "rope_scaling")}
    theta = keys.number("rope_theta", 10000.0)
    read = [_read_rope_section(section, theta) for section in spelled.values() if section is not None]
    if len(read) == 2 and read[0] != read[1]:
        raise keys.error("rope_scaling", "must say the same as rope_parameters when both are given")
    rope = read[0] if read else RopeConfig(theta, None)
    if rope.theta <= 1:
        raise keys.error("rope_theta", "must be above 1")
    return rope


def _read_rope_section(rope: JsonKeys, theta: float) -> RopeConfig:
    theta = rope.number("rope_theta", theta)
    kind = "rope_type" if rope.raw("rope_type") is not None else "type"
    if rope.choice(kind, ("default", "yarn")) == "default":
        return RopeConfig(theta, None)
    # Extensions of transformers that no published DeepSeek-V2 has, and whose silent neglect would change the logits.
    for key, neutral in (("attention_factor", None), ("truncate", True), ("partial_rotary_factor", 1.0)):
        if rope.raw(key) not in (None, neutral):
            raise rope.error(key, "is not supported")
    yarn = YarnConfig(
        factor=rope.number("factor"),
        original_max_position_embeddings=rope.positive("original_max_position_embeddings"),
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        mscale=rope.number("mscale", 1.0),
        mscale_all_dim=rope.number("mscale_all_dim", 0.0),
    )
    for key in ("factor", "beta_fast", "beta_slow"):
        if rope.number(key, 1.0) <= 0:
            raise rope.error(key, "must be above 0")
    return RopeConfig(theta, yarn)
