"""Reads by threads of their own: all are made, told in order, the first damaged tensor is told, no thread is left."""

import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from blake3 import blake3

from model_shards.errors import CheckpointError
from model_shards.weights.background import BackgroundReads
from model_shards.weights.header import StoredTensor

SIZES = pytest.mark.parametrize("size", [4, 2**19 + 3, 2**21], ids=["small", "middling", "large"])
COUNT = 20


def stored_in(file: Path, size: int, damaged: int | None = None, summed: bool = True) -> list[StoredTensor]:
    """Tensors of a new file, one with another sum than its bytes have."""
    contents = [bytes([number]) * size for number in range(COUNT)]
    file.write_bytes(b"".join(contents))
    sums = [blake3(b"other" if number == damaged else data).hexdigest() for number, data in enumerate(contents)]
    return [
        StoredTensor(f"t{number}", file, torch.uint8, (size,), number * size, size, sums[number] if summed else None)
        for number in range(COUNT)
    ]


def read_all(tensors: Sequence[StoredTensor], interruption: BaseException | None = None) -> list[bytearray]:
    """What was read; leaves by `interruption`, if there is one, once all are added."""
    targets = [bytearray(tensor.num_bytes) for tensor in tensors]
    told: list[StoredTensor] = []
    with tensors[0].file.open("rb", buffering=0) as stream, BackgroundReads(told.append) as reads:
        for tensor, target in zip(tensors, targets, strict=True):
            reads.add(stream, tensor, memoryview(target))
        if interruption is not None:
            raise interruption
    assert told == list(tensors)
    return targets


def reading_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("read-weights")]


@SIZES
@pytest.mark.parametrize("summed", [True, False])
def test_all_bytes_are_where_they_belong(tmp_path: Path, size: int, summed: bool) -> None:
    targets = read_all(stored_in(tmp_path / "f.safetensors", size, summed=summed))
    assert [bytes(target) for target in targets] == [bytes([number]) * size for number in range(COUNT)]
    assert reading_threads() == []


@SIZES
@pytest.mark.parametrize("damaged", [0, 7, 19])
def test_a_damaged_tensor_is_told_wherever_it_stands(tmp_path: Path, damaged: int, size: int) -> None:
    tensors = stored_in(tmp_path / "f.safetensors", size, damaged)
    with pytest.raises(CheckpointError, match=rf"tensor t{damaged} must have"):
        read_all(tensors)
    assert reading_threads() == []


@SIZES
def test_a_file_that_became_shorter_is_told(tmp_path: Path, size: int) -> None:
    tensors = stored_in(tmp_path / "f.safetensors", size)
    with tensors[0].file.open("r+b") as stream:
        stream.truncate(8 * size + 1)
    with pytest.raises(CheckpointError, match="became shorter while tensor t8 was read from it"):
        read_all(tensors)


@SIZES
def test_an_error_of_the_caller_is_not_hidden_by_one_of_a_read(tmp_path: Path, size: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        read_all(stored_in(tmp_path / "f.safetensors", size, COUNT - 1), KeyboardInterrupt())
    assert reading_threads() == []
