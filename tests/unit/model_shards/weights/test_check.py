"""A checkpoint that is not what config.json says: each error names tensor, file, expected and found shape."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model_shards.errors import CheckpointError
from model_shards.weights import check_checkpoint
from tests.checkpoints import (
    INDEX_FILE,
    SINGLE_FILE,
    branchy_model,
    cut_state,
    stored_state,
    write_index,
    write_indexed,
    write_single,
)
from tests.reference import model_config_of

MODEL = branchy_model()
CONFIG = model_config_of(MODEL.config)
STATE = stored_state(MODEL)
GATE = "model.layers.1.mlp.gate.weight"
EXPERT = "model.layers.2.mlp.experts.7.down_proj.weight"


def problem(directory: Path) -> str:
    """The message of the refusal."""
    with pytest.raises(CheckpointError) as refused:
        check_checkpoint(directory, CONFIG)
    assert str(directory) in str(refused.value)
    return str(refused.value)


def without(*names: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in STATE.items() if name not in names}


def test_a_whole_checkpoint_passes_as_one_file_and_as_many(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    write_single(tmp_path / "one", STATE)
    check_checkpoint(tmp_path / "one", CONFIG)
    (tmp_path / "many").mkdir()
    write_indexed(tmp_path / "many", cut_state(STATE, 4))
    check_checkpoint(tmp_path / "many", CONFIG)


@settings(max_examples=15, deadline=None)
@given(name=st.sampled_from(sorted(STATE)), num_files=st.integers(1, 3))
def test_any_missing_tensor_is_named_with_its_shape(
    tmp_path_factory: pytest.TempPathFactory, name: str, num_files: int
) -> None:
    directory = tmp_path_factory.mktemp("missing")
    write_indexed(directory, cut_state(without(name), num_files))
    message = problem(directory)
    assert f"{directory / INDEX_FILE} does not fit config.json" in message
    assert f"tensor {name} of shape {list(STATE[name].shape)} is missing" in message


@settings(max_examples=15, deadline=None)
@given(name=st.sampled_from(sorted(STATE)), change=st.sampled_from(["longer", "flat", "one dimension more"]))
def test_any_misshapen_tensor_is_named_with_file_and_both_shapes(
    tmp_path_factory: pytest.TempPathFactory, name: str, change: str
) -> None:
    directory = tmp_path_factory.mktemp("misshapen")
    tensor = STATE[name]
    bad = {
        "longer": torch.cat((tensor, tensor[:1])),
        "flat": tensor.reshape(1, -1),
        "one dimension more": tensor[None],
    }[change]
    write_single(directory, {**STATE, name: bad})
    rule = f"{SINGLE_FILE}: tensor {name} must have shape {list(tensor.shape)}, got {list(bad.shape)}"
    assert rule in problem(directory)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.3.input_layernorm.weight",  # a layer too many
        "model.layers.1.mlp.experts.8.up_proj.weight",  # an expert too many
        "model.layers.0.mlp.experts.0.up_proj.weight",  # the first layer is dense
        "model.layers.0.self_attn.q_proj.weight",  # queries are low-rank here
        "model.layers.0.self_attn.kv_b_proj.weight_scale_inv",  # quantized
        "model.norm.bias",
    ],
)
def test_an_extra_tensor_is_named_with_its_file_and_shape(tmp_path: Path, name: str) -> None:
    write_indexed(tmp_path, {**cut_state(STATE, 2), "more.safetensors": {name: torch.zeros(3, 5)}})
    assert f"more.safetensors holds tensor {name} of shape [3, 5], which no layer has" in problem(tmp_path)


def test_several_problems_are_told_at_once_and_many_are_counted(tmp_path: Path) -> None:
    write_single(tmp_path, {**without(GATE), EXPERT: torch.zeros(2), "odd": torch.zeros(1)})
    message = problem(tmp_path)
    assert all(f"tensor {name} " in message for name in (GATE, EXPERT, "odd"))
    write_single(tmp_path, {"odd": torch.zeros(1)})
    assert f"and {len(STATE) + 1 - 5} more" in problem(tmp_path)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.float8_e4m3fn])
def test_a_tensor_that_is_no_float_is_named_with_its_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    write_single(tmp_path, {**STATE, EXPERT: torch.zeros(STATE[EXPERT].shape, dtype=dtype)})
    message = problem(tmp_path)
    assert f"{tmp_path / SINGLE_FILE}: tensor {EXPERT} must be one of F64, F32, F16, BF16, got '" in message


def test_rotary_tables_that_older_exporters_add_are_ignored(tmp_path: Path) -> None:
    write_single(tmp_path, {**STATE, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)})
    check_checkpoint(tmp_path, CONFIG)


def test_a_tied_head_may_stand_in_the_file_and_an_untied_one_must(tmp_path: Path) -> None:
    tied = branchy_model(tie_word_embeddings=True)
    state = stored_state(tied)
    config = model_config_of(tied.config)
    write_single(tmp_path, state)
    check_checkpoint(tmp_path, config)
    with pytest.raises(CheckpointError, match=r"tensor lm_head\.weight of shape \[131, 64\] is missing"):
        check_checkpoint(tmp_path, CONFIG)
    write_single(tmp_path, {**state, "lm_head.weight": state["model.embed_tokens.weight"].clone()})
    check_checkpoint(tmp_path, config)


def test_a_directory_that_is_none_or_holds_no_weights_is_named(tmp_path: Path) -> None:
    assert f"{tmp_path / 'nowhere'} is not a directory" in problem(tmp_path / "nowhere")
    assert f"{tmp_path} holds neither {SINGLE_FILE} nor {INDEX_FILE}" in problem(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\0")
    assert f"{tmp_path} holds neither {SINGLE_FILE} nor {INDEX_FILE}" in problem(tmp_path)


def test_a_directory_whose_name_is_too_long_is_named(tmp_path: Path) -> None:
    assert "cannot be read: File name too long" in problem(tmp_path / ("x" * 300))


def test_one_file_goes_before_an_index(tmp_path: Path) -> None:
    write_single(tmp_path, STATE)
    write_index(tmp_path, {"odd": "gone.safetensors"})
    check_checkpoint(tmp_path, CONFIG)


def test_a_missing_file_of_the_index_is_named(tmp_path: Path) -> None:
    write_indexed(tmp_path, cut_state(STATE, 3))
    (tmp_path / "part-1.safetensors").unlink()
    message = problem(tmp_path)
    assert f"{tmp_path / 'part-1.safetensors'} is missing, and {tmp_path / INDEX_FILE} names it" in message


def test_a_truncated_file_of_the_index_is_named(tmp_path: Path) -> None:
    write_indexed(tmp_path, cut_state(STATE, 3))
    file = tmp_path / "part-2.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert f"{file} is truncated" in problem(tmp_path)


@pytest.mark.parametrize(
    "file",
    [
        *("../model.safetensors", "/etc/passwd", "sub/part.safetensors", "..", ".", "", "part.safetensors/"),
        *("a\0b", "a\nb", "a\ud800", None, 1, ["part-0.safetensors"], {}),
    ],
)
def test_an_index_may_name_only_files_beside_it(tmp_path: Path, file: object) -> None:
    (tmp_path / "inside").mkdir()
    directory = tmp_path / "inside"
    write_single(tmp_path, {GATE: STATE[GATE]})
    write_indexed(directory, {"part-0.safetensors": without(GATE)})
    write_index(directory, {**dict.fromkeys(without(GATE), "part-0.safetensors"), GATE: file})
    message = problem(directory)
    assert f"{directory / INDEX_FILE}: weight_map: {GATE} must be the name of a file beside the index" in message
    message.encode()  # it can be printed


def test_an_index_naming_a_file_with_a_name_too_long_is_refused(tmp_path: Path) -> None:
    write_index(tmp_path, {GATE: "x" * 300})
    assert "cannot be read: File name too long" in problem(tmp_path)


def test_a_tensor_in_two_files_is_named_with_both(tmp_path: Path) -> None:
    write_indexed(tmp_path, {"a.safetensors": STATE, "b.safetensors": {EXPERT: STATE[EXPERT]}})
    message = problem(tmp_path)
    assert f"tensor {EXPERT} is in {tmp_path / 'a.safetensors'} and in {tmp_path / 'b.safetensors'}" in message


def test_a_tensor_that_is_not_where_the_index_says_is_named(tmp_path: Path) -> None:
    files = cut_state(STATE, 2)
    write_indexed(tmp_path, files)
    file_of = {name: file for file, state in files.items() for name in state}
    other = {"part-0.safetensors": "part-1.safetensors", "part-1.safetensors": "part-0.safetensors"}[file_of[GATE]]
    write_index(tmp_path, {**file_of, GATE: other})
    assert f"{tmp_path / INDEX_FILE} says that tensor {GATE} is in {other}, but that file" in problem(tmp_path)
    write_index(tmp_path, {**file_of, "odd": other})
    assert f"says that tensor odd is in {other}" in problem(tmp_path)


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (b"{", "is not valid JSON"),
        (b"\xff\xfe", "is not valid JSON"),
        (b"[]", "must hold a JSON object, got list"),
        (b"{}", "weight_map is missing"),
        (b'{"weight_map": null}', "weight_map is missing"),
        (b'{"weight_map": []}', "weight_map must be an object, got []"),
    ],
)
def test_a_damaged_index_is_named(tmp_path: Path, content: bytes, rule: str) -> None:
    (tmp_path / INDEX_FILE).write_bytes(content)
    message = problem(tmp_path)
    assert str(tmp_path / INDEX_FILE) in message
    assert rule in message


def test_an_index_of_nothing_misses_every_tensor(tmp_path: Path) -> None:
    write_index(tmp_path, {})
    assert f"and {len(STATE) - 5} more" in problem(tmp_path)
