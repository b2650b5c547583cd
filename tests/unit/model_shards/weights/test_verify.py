"""A cut checkpoint is checked while it is loaded: no damage to it reaches a model."""

import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model_shards.config import load_model_config
from model_shards.cut import cut_checkpoint
from model_shards.errors import CheckpointError
from model_shards.quantization import Quantization
from model_shards.weights import check_checkpoint, load_attention_model, load_expert_shard
from tests.checkpoints import branchy_model, save_model, stored_extents
from tests.reference import CPU

EXPERT = "expert-00004.safetensors"
NAME = "model.layers.2.mlp.experts.4.down_proj.weight"


def load_all(directory: Path) -> None:
    """As `shoal serve` does: the check before the start, then both roles."""
    config = load_model_config(directory)
    check_checkpoint(directory, config)
    load_attention_model(directory, config, torch.float32, CPU)
    load_expert_shard(directory, config, tuple(range(8)), torch.float32, CPU)


@pytest.fixture(scope="module", params=[None, Quantization.INT8, Quantization.FP8])
def cut(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("cut")
    save_model(branchy_model(), directory / "source")
    cut_checkpoint(directory / "source", directory / "cut", request.param)
    load_all(directory / "cut")
    return directory / "cut"


def problem(directory: Path) -> str:
    with pytest.raises(CheckpointError) as refused:
        load_all(directory)
    return str(refused.value)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_flipped_bit_anywhere_is_found_and_its_file_named(cut: Path, data: st.DataObject) -> None:
    files = sorted(file for file in cut.iterdir() if file.name not in ("shoal.json", "model.safetensors.index.json"))
    file = data.draw(st.sampled_from(files))
    original = file.read_bytes()
    position = data.draw(st.integers(0, len(original) - 1))
    damaged = bytearray(original)
    damaged[position] ^= 1 << data.draw(st.integers(0, 7))
    file.write_bytes(damaged)
    try:
        assert str(file) in problem(cut)
    finally:
        file.write_bytes(original)


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_a_truncated_file_is_found_with_both_sizes(cut: Path, data: st.DataObject) -> None:
    file = data.draw(st.sampled_from(sorted(cut.glob("*.safetensors"))))
    original = file.read_bytes()
    kept = data.draw(st.integers(0, len(original) - 1))
    file.write_bytes(original[:kept])
    try:
        message = problem(cut)
        assert f"{file} is truncated or changed: it must have {len(original)} bytes, found {kept}" in message
        assert "run the same `shoal shard` again" in message
    finally:
        file.write_bytes(original)


def test_a_flipped_bit_is_told_with_tensor_expected_and_found_and_mended_by_cutting_again(cut: Path) -> None:
    file = cut / EXPERT
    original = file.read_bytes()
    damaged = bytearray(original)
    damaged[stored_extents(cut)[NAME].start + 5] ^= 1
    file.write_bytes(damaged)
    check_checkpoint(cut, load_model_config(cut))  # sizes and headers are right; only loading reads the weights
    expected = json.loads((cut / "shoal.json").read_text())["files"][EXPERT]["tensors"][NAME]
    message = problem(cut)
    assert re.search(rf"{file} is damaged: tensor {NAME} must have BLAKE3 {expected}, found [0-9a-f]{{64}}; ", message)
    assert expected not in message.partition("found")[2]
    load_expert_shard(cut, load_model_config(cut), (0, 1, 2, 3), torch.float32, CPU)  # a shard that does not read it

    file.unlink()
    quantization = json.loads((cut / "shoal.json").read_text())["quantization"]
    cut_checkpoint(cut.parent / "source", cut, quantization and Quantization(quantization))
    assert file.read_bytes() == original
    load_all(cut)


def test_a_missing_file_is_named(cut: Path) -> None:
    for name in (EXPERT, "config.json"):
        original = (cut / name).read_bytes()
        (cut / name).unlink()
        try:
            assert f"{cut / name} is missing" in problem(cut)
        finally:
            (cut / name).write_bytes(original)


def edited(cut: Path, change: object) -> str:
    """The refusal of a cut whose manifest `change` has edited."""
    manifest = cut / "shoal.json"
    original = manifest.read_text()
    values = json.loads(original)
    change(values)
    manifest.write_text(json.dumps(values))
    try:
        return problem(cut)
    finally:
        manifest.write_text(original)


def test_a_manifest_that_cannot_be_right_is_refused_by_key_rule_and_value(cut: Path) -> None:
    def entry(values: dict) -> dict:
        return values["files"][EXPERT]

    cases = [
        (lambda v: v.update(format_version=3), "format_version must be 2: cut it again"),
        (lambda v: v.update(quantization="int4"), 'quantization must be "int8" or "fp8", got "int4"'),
        (lambda v: v.update(config_sha256="x"), "config_sha256 must be a SHA-256"),
        (lambda v: v.pop("files"), "files is missing"),
        (lambda v: v["files"].update({"../x": entry(v)}), "must be the name of a file beside the manifest"),
        (lambda v: entry(v).update(bytes=-1), "bytes must be an integer of 0 or more"),
        (lambda v: entry(v)["tensors"].update({NAME: None}), f"{NAME} must be a BLAKE3 sum"),
        (lambda v: entry(v)["tensors"].pop(NAME), f"names other tensors of {EXPERT} than"),
        (
            lambda v: v["files"].pop(EXPERT),
            "tensor model.layers.1.mlp.experts.4.gate_proj.weight of shape [32, 64] is missing",
        ),
        (lambda v: entry(v).update(header_sha256="0" * 64), "its header must have SHA-256 " + "0" * 64),
    ]
    for change, rule in cases:
        message = edited(cut, change)
        assert rule in message
        assert str(cut) in message


def test_a_manifest_of_another_quantization_does_not_turn_bytes_into_other_weights(cut: Path) -> None:
    true = json.loads((cut / "shoal.json").read_text())["quantization"]
    for claimed in {None, "int8", "fp8"} - {true}:
        message = edited(cut, lambda values, claimed=claimed: values.update(quantization=claimed))
        assert "must be" in message or "does not fit" in message
