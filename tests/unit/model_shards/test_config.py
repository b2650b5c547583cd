"""Reading config.json: both spellings of the rotary settings, defaults, and every refusal by name and value."""

import json
from pathlib import Path

import pytest

from model_shards.config import RopeConfig, YarnConfig, load_model_config
from model_shards.errors import CheckpointError

# The published config.json of DeepSeek-V2-Lite, less the keys that no code reads.
V2_LITE: dict[str, object] = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "aux_loss_alpha": 0.001,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v2",
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "greedy",
    "v_head_dim": 128,
    "vocab_size": 102400,
}
YARN = YarnConfig(40.0, 4096, 32.0, 1.0, 0.707, 0.707)


def write(directory: Path, values: object, name: str = "config.json") -> Path:
    (directory / name).write_text(json.dumps(values))
    return directory


def without(*keys: str) -> dict[str, object]:
    return {key: value for key, value in V2_LITE.items() if key not in keys}


def test_the_published_v2_lite_config_is_read(tmp_path: Path) -> None:
    config = load_model_config(write(tmp_path, V2_LITE))
    assert (config.hidden_size, config.num_hidden_layers, config.q_lora_rank) == (2048, 27, None)
    assert (config.n_routed_experts, config.num_experts_per_tok, config.n_shared_experts) == (64, 6, 2)
    assert config.latent_dim == 576
    assert config.moe_layers == tuple(range(1, 27))
    assert config.rope == RopeConfig(10000.0, YARN)
    assert config.eos_token_ids == (100001,)


@pytest.mark.parametrize("kind", ["type", "rope_type"])
def test_all_spellings_of_the_rotary_settings_agree(tmp_path: Path, kind: str) -> None:
    scaling = {**V2_LITE["rope_scaling"], "rope_theta": 5e5}
    del scaling["type"]
    values = {**without("rope_scaling", "rope_theta"), "rope_parameters": {**scaling, kind: "yarn"}}
    assert load_model_config(write(tmp_path, values)).rope == RopeConfig(5e5, YARN)
    del scaling["rope_theta"]
    values = {**V2_LITE, "rope_theta": 5e5, "rope_scaling": {**scaling, kind: "yarn"}}
    assert load_model_config(write(tmp_path, values)).rope == RopeConfig(5e5, YARN)
    values["rope_parameters"] = {**scaling, "rope_type": "yarn", "rope_theta": 5e5}  # both, and they agree
    assert load_model_config(write(tmp_path, values)).rope == RopeConfig(5e5, YARN)


@pytest.mark.parametrize("rope", [{}, {"rope_scaling": None}, {"rope_parameters": {"rope_type": "default"}}])
def test_without_scaling_the_rotary_embedding_is_plain(tmp_path: Path, rope: dict[str, object]) -> None:
    assert load_model_config(write(tmp_path, {**without("rope_scaling"), **rope})).rope == RopeConfig(10000.0, None)


def test_missing_optional_keys_take_the_defaults_of_transformers(tmp_path: Path) -> None:
    optional = ("n_group", "topk_group", "topk_method", "norm_topk_prob", "routed_scaling_factor", "rms_norm_eps")
    optional += ("first_k_dense_replace", "moe_layer_freq", "attention_bias", "tie_word_embeddings", "rope_scaling")
    optional += ("eos_token_id", "bos_token_id", "max_position_embeddings", "hidden_act", "scoring_func", "rope_theta")
    config = load_model_config(write(tmp_path, without(*optional)))
    assert (config.topk_method, config.norm_topk_prob, config.routed_scaling_factor) == ("greedy", False, 1.0)
    assert (config.first_k_dense_replace, config.moe_layer_freq, config.rms_norm_eps) == (0, 1, 1e-6)
    assert (config.bos_token_id, config.eos_token_ids, config.max_position_embeddings) == (1, (2,), 2048)
    assert config.rope == RopeConfig(10000.0, None)


@pytest.mark.parametrize(
    ("in_config", "in_generation", "expected"),
    [(5, None, (5,)), ([5, 6], None, (5, 6)), (5, [7, 5], (5, 7)), (None, 7, (7,)), (None, None, ())],
)
def test_stop_tokens_come_from_both_files(
    tmp_path: Path, in_config: object, in_generation: object, expected: tuple[int, ...]
) -> None:
    write(tmp_path, {**V2_LITE, "eos_token_id": in_config})
    if in_generation is not None:
        write(tmp_path, {"eos_token_id": in_generation}, "generation_config.json")
    assert load_model_config(tmp_path).eos_token_ids == expected


def test_a_dense_model_has_no_moe_layers(tmp_path: Path) -> None:
    values = {**V2_LITE, "n_routed_experts": None, "n_shared_experts": None, "num_experts_per_tok": None}
    assert load_model_config(write(tmp_path, values)).moe_layers == ()


def test_zero_shared_experts_are_none(tmp_path: Path) -> None:
    assert load_model_config(write(tmp_path, {**V2_LITE, "n_shared_experts": 0})).n_shared_experts is None


REFUSED: list[tuple[str, object]] = [
    ("architectures", ["DeepseekV3ForCausalLM"]),
    ("architectures", None),
    ("hidden_size", "2048"),
    ("hidden_size", 0),
    ("hidden_size", True),
    ("hidden_size", 2048.0),
    ("q_lora_rank", -1),
    ("first_k_dense_replace", -1),
    ("rms_norm_eps", "small"),
    ("rms_norm_eps", float("nan")),
    ("attention_bias", 1),
    ("topk_method", "noaux_tc"),
    ("topk_method", "gready"),
    ("scoring_func", "sigmoid"),
    ("hidden_act", "gelu"),
    ("mlp_bias", True),
    ("num_key_value_heads", 4),
    ("quantization_config", {"quant_method": "fp8"}),
    ("qk_rope_head_dim", 63),
    ("num_experts_per_tok", 65),
    ("num_experts_per_tok", None),
    ("eos_token_id", "</s>"),
    ("eos_token_id", [1, -2]),
    ("eos_token_id", True),
    ("rope_theta", "10000"),
    ("rope_theta", 1),
    ("rope_theta", -10000.0),
    ("rope_scaling", "yarn"),
    ("rope_parameters", {"rope_type": "default"}),
    ("rms_norm_eps", -1e-6),
    ("rms_norm_eps", 10**400),
]


@pytest.mark.parametrize(("key", "value"), REFUSED)
def test_a_refused_value_is_named_with_its_file_and_key(tmp_path: Path, key: str, value: object) -> None:
    with pytest.raises(CheckpointError) as refused:
        load_model_config(write(tmp_path, {**V2_LITE, key: value}))
    assert str(tmp_path / "config.json") in str(refused.value)
    assert key in str(refused.value)
    shown = V2_LITE["rope_scaling"] if key == "rope_parameters" else value
    assert json.dumps(shown)[:100] in str(refused.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("type", "linear"),
        ("factor", None),
        ("factor", 0),
        ("original_max_position_embeddings", 4096.5),
        ("mscale", "0.707"),
        ("attention_factor", 1.2),
        ("truncate", False),
    ],
)
def test_a_refused_rotary_setting_is_named(tmp_path: Path, key: str, value: object) -> None:
    rope = {**V2_LITE["rope_scaling"], key: value}
    with pytest.raises(CheckpointError, match=rf"config\.json: rope_scaling: {key} .*{json.dumps(value)}"):
        load_model_config(write(tmp_path, {**V2_LITE, "rope_scaling": rope}))


@pytest.mark.parametrize(
    "key", ["architectures", "vocab_size", "hidden_size", "kv_lora_rank", "q_lora_rank", "n_routed_experts"]
)
def test_a_missing_key_that_fixes_a_shape_is_named(tmp_path: Path, key: str) -> None:
    with pytest.raises(CheckpointError, match=rf"config\.json: {key} .*missing"):
        load_model_config(write(tmp_path, without(key)))


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"n_group": 7}, "n_group"),
        ({"n_group": 8, "topk_group": 9}, "topk_group"),
        ({"n_group": None}, "n_group"),
        ({"n_group": 16, "topk_group": 1}, "num_experts_per_tok"),
    ],
)
def test_groups_that_do_not_fit_are_refused(tmp_path: Path, changes: dict[str, object], key: str) -> None:
    values = {**V2_LITE, "topk_method": "group_limited_greedy", **changes}
    with pytest.raises(CheckpointError, match=rf"config\.json: {key} "):
        load_model_config(write(tmp_path, values))


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere/config\.json is missing"):
        load_model_config(tmp_path / "nowhere")


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe{}", b"", b"[" * 200_000])
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json is not valid JSON"):
        load_model_config(tmp_path)


def test_a_file_that_is_no_object_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json must hold a JSON object, got list"):
        load_model_config(write(tmp_path, []))
