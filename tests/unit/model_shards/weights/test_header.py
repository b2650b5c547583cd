"""The head of a safetensors file: read as the library writes it, and refused by name whatever else stands there."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from model_shards.errors import CheckpointError
from model_shards.weights.header import StoredTensor, read_header
from tests.checkpoints import write_safetensors

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
ENTRY = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
HEADER = {"a": ENTRY, "b": {"dtype": "BF16", "shape": [5], "data_offsets": [24, 34]}}
DATA = bytes(34)
FUZZ = settings(max_examples=30, deadline=None)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("header") / "model.safetensors"


def problem(file: Path) -> str:
    """The message of the refusal."""
    with pytest.raises(CheckpointError) as refused:
        read_header(file)
    assert str(file) in str(refused.value)
    return str(refused.value)


def tile(tensors: tuple[StoredTensor, ...], file: Path) -> bool:
    """Whether the tensors lie end to end up to the end of the file."""
    ends = [tensor.start + tensor.num_bytes for tensor in tensors]
    return [tensor.start for tensor in tensors[1:]] == ends[:-1] and (not ends or ends[-1] == file.stat().st_size)


def read_or_refuse(file: Path) -> None:
    """Reads the header; the one way to fail is an error that names the file and can be printed."""
    refusal: str | None = None
    try:
        tensors = read_header(file)
    except CheckpointError as refused:
        refusal = str(refused)
    if refusal is None:
        assert tile(tensors, file)
    else:
        assert str(file) in refusal
        refusal.encode()


@FUZZ
@given(
    shapes=st.dictionaries(
        st.text(st.characters(codec="utf-8"), min_size=1, max_size=8),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3)),
        max_size=6,
    ),
    metadata=st.none() | st.just({"format": "pt"}),
)
def test_a_file_of_the_library_is_read_as_it_was_written(
    file: Path, shapes: dict[str, tuple[torch.dtype, list[int]]], metadata: dict[str, str] | None
) -> None:
    state = {name: torch.rand(shape, dtype=torch.float64).to(dtype) for name, (dtype, shape) in shapes.items()}
    state.pop("__metadata__", None)
    save_file(state, file, metadata)
    tensors = read_header(file)
    content = file.read_bytes()
    assert {tensor.name for tensor in tensors} == state.keys()
    assert tile(tensors, file)
    for tensor in tensors:
        expected = state[tensor.name]
        stored = content[tensor.start : tensor.start + tensor.num_bytes]
        assert (tensor.dtype, tensor.shape, tensor.file) == (expected.dtype, tuple(expected.shape), file)
        assert stored == expected.flatten().view(torch.uint8).numpy().tobytes()


@FUZZ
@given(content=st.binary(max_size=64))
@example(b"")
@example(b"\xff" * 8)
@example(bytes(8))
def test_arbitrary_bytes_are_refused_by_name(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    read_or_refuse(file)


@FUZZ
@given(text=st.binary(max_size=64))
@example(b"[" * 100_000)
@example(b'{"a":' * 100_000)
@example(b"9" * 5000)
@example(b"NaN")
def test_an_arbitrary_header_is_refused_by_name(file: Path, text: bytes) -> None:
    read_or_refuse(write_safetensors(file, text, DATA))


@FUZZ
@given(
    position=st.integers(0, 7 + len(json.dumps(HEADER))), byte=st.integers(0, 255), cut=st.integers(0, 200) | st.none()
)
def test_a_damaged_byte_or_a_cut_never_passes_unseen_or_crashes(
    file: Path, position: int, byte: int, cut: int | None
) -> None:
    content = bytearray(write_safetensors(file, HEADER, DATA).read_bytes())
    content[position] = byte
    file.write_bytes(content[:cut])
    read_or_refuse(file)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
HUGE = 10**4000
ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "I64", "\ud800"]) | JSON,
        "shape": st.lists(st.sampled_from([0, 1, 2, -1, HUGE, 2**62]) | JSON, max_size=4) | JSON,
        "data_offsets": st.lists(st.sampled_from([0, 4, 24, 34, -4, HUGE]), max_size=3) | JSON,
    },
)


@settings(max_examples=30, deadline=None)
@given(header=st.dictionaries(st.text(max_size=3), ENTRIES | JSON, max_size=3) | JSON)
@example({"a": {"dtype": "F32", "shape": [HUGE, HUGE], "data_offsets": [0, 34]}})
@example({"a": {"dtype": "F32", "shape": [2**62] * 300, "data_offsets": [0, 34]}})
@example({"a": {"dtype": "BF16", "shape": [17], "data_offsets": [HUGE, HUGE + 34]}})
@example({"\ud800": {"dtype": "BF16", "shape": [16], "data_offsets": [0, 34]}})
def test_any_json_for_a_header_is_read_or_refused_by_name(file: Path, header: object) -> None:
    read_or_refuse(write_safetensors(file, header, DATA))


@pytest.mark.parametrize("kept", [0, 1, 7])
def test_a_file_shorter_than_its_first_number_is_truncated(file: Path, kept: int) -> None:
    content = write_safetensors(file, HEADER, DATA).read_bytes()
    file.write_bytes(content[:kept])
    assert "is truncated or no safetensors file: its first 8 bytes announce a header of" in problem(file)
    assert f"the file has {kept}" in problem(file)


def test_a_file_cut_within_its_header_is_truncated(file: Path) -> None:
    content = write_safetensors(file, HEADER, DATA).read_bytes()
    length = len(json.dumps(HEADER))
    file.write_bytes(content[: 8 + length - 1])
    assert f"is truncated or no safetensors file: its first 8 bytes announce a header of {length} bytes" in problem(
        file
    )


@pytest.mark.parametrize("missing", [1, 10, 34])
def test_a_file_cut_within_its_data_is_truncated(file: Path, missing: int) -> None:
    content = write_safetensors(file, HEADER, DATA).read_bytes()
    file.write_bytes(content[:-missing])
    size = len(content)
    assert f"is truncated: its header asks for {size} bytes, the file has {size - missing}" in problem(file)


def test_a_file_longer_than_its_data_is_damaged(file: Path) -> None:
    write_safetensors(file, HEADER, DATA + b"\0")
    assert "is damaged: its header ends at" in problem(file)


def test_a_missing_file_and_a_directory_are_named(tmp_path: Path) -> None:
    assert "is missing" in problem(tmp_path / "none.safetensors")
    assert "cannot be read: Is a directory" in problem(tmp_path)


def test_a_git_lfs_pointer_is_no_safetensors_file(file: Path) -> None:
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    assert "is truncated or no safetensors file" in problem(file)


@pytest.mark.parametrize(
    ("header", "rule"),
    [
        (b"{", "header is not valid JSON"),
        (b"\xff\xff", "header is not valid JSON"),
        (b"[" * 100_000, "header is not valid JSON"),
        (b"[]", "header is not a JSON object"),
        (b'{"a": {}, "a": {}}', "a stands 2 times in one object"),
        ({"a": 1}, "entry of tensor a is not valid"),
        ({"a": {**ENTRY, "dtype": 1}}, "entry of tensor a is not valid"),
        ({"a": {**ENTRY, "shape": None}}, "entry of tensor a is not valid"),
        ({"a": {**ENTRY, "shape": [2, -3]}}, "entry of tensor a is not valid"),
        ({"a": {**ENTRY, "shape": [True, 6]}}, "entry of tensor a is not valid"),
        ({"a": {**ENTRY, "shape": [2.0, 3]}}, "entry of tensor a is not valid"),
        ({"a": {**ENTRY, "data_offsets": [0]}}, "entry of tensor a is not valid"),
        (
            {"a": {**ENTRY, "data_offsets": [0, 23]}},
            "tensor a of shape [2, 3] and dtype F32 does not take the 23 bytes",
        ),
        ({"a": {**ENTRY, "data_offsets": [24, 0]}}, "tensor a of shape [2, 3] and dtype F32 does not take the -24"),
        ({"a": {**ENTRY, "dtype": "I32"}}, "tensor a must be one of F64, F32, F16, BF16, got 'I32'"),
        ({**HEADER, "b": {**HEADER["b"], "data_offsets": [25, 35]}}, "tensor b begins at byte"),  # a hole
        ({**HEADER, "b": {**HEADER["b"], "data_offsets": [20, 30]}}, "tensor b begins at byte"),  # an overlap
    ],
)
def test_a_damaged_header_says_what_is_wrong(file: Path, header: object, rule: str) -> None:
    assert rule in problem(write_safetensors(file, header, DATA))


@pytest.mark.parametrize("first", ["a", "z"])
def test_a_tensor_without_elements_may_begin_where_another_does(file: Path, first: str) -> None:
    entries = {"a": ENTRY, "z": {"dtype": "F32", "shape": [0, 3], "data_offsets": [0, 0]}}
    header = {first: entries[first], **entries}
    assert [tensor.name for tensor in read_header(write_safetensors(file, header, bytes(24)))] == ["z", "a"]
