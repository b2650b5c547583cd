"""The written directory: what the service and transformers read from it."""

import json
import stat
from pathlib import Path

import pytest
import torch
from transformers import DeepseekV2ForCausalLM

from model_shards.config import load_model_config
from model_shards.errors import CheckpointError
from training.export import export_model, published_config
from training.model import build_model, demo_config

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def model() -> DeepseekV2ForCausalLM:
    config = demo_config(64, bos_token_id=0, eos_token_id=1)
    config.update({"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 32, "moe_intermediate_size": 8})
    return build_model(config, seed=0).eval()


def test_transformers_reads_back_the_same_model_in_bf16(model, tmp_path):
    export_model(model, tmp_path)
    loaded = DeepseekV2ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for (name, expected), actual in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(actual, expected.bfloat16().float()), name
    tokens = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.no_grad():
        assert torch.allclose(loaded(tokens).logits, model(tokens).logits, atol=1e-2)
    assert loaded.config.rope_parameters == {"type": "yarn", **model.config.rope_parameters}


def test_config_json_has_the_published_spelling(model, tmp_path):
    export_model(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["DeepseekV2ForCausalLM"]
    assert config["rope_scaling"]["type"] == "yarn"
    assert "rope_parameters" not in config
    read = load_model_config(tmp_path)
    assert read.rope.yarn is not None
    assert (read.rope.theta, read.rope.yarn.factor) == (10000.0, 4.0)
    assert read.topk_method == "group_limited_greedy"


def test_config_json_has_the_keys_of_the_model_in_the_package(model):
    packaged = json.loads((ROOT / "deploy/models/shoal-demo/config.json").read_text())
    assert published_config(model.config).keys() == packaged.keys()


def test_files_are_readable_by_everyone_whatever_the_umask(model, tmp_path):
    export_model(model, tmp_path)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == dict.fromkeys(["config.json", "generation_config.json", "model.safetensors"], 0o644)


def test_a_model_that_is_not_what_its_config_says_is_refused(model, tmp_path):
    model.config.vocab_size += 1
    try:
        with pytest.raises(CheckpointError, match=r"lm_head\.weight must have shape \[65, 32\]"):
            export_model(model, tmp_path)
    finally:
        model.config.vocab_size -= 1
