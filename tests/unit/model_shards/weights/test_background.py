"""Reads by threads of their own: all are made, told in order, the first damaged tensor is told, no thread is left."""

import os
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from blake3 import blake3

from model_shards.errors import CheckpointError
from model_shards.weights.background import BackgroundReads
from model_shards.weights.header import StoredTensor
from model_shards.weights.runs import runs_of

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
    targets = {tensor.name: bytearray(tensor.num_bytes) for tensor in tensors}
    told: list[StoredTensor] = []
    runs = runs_of([(tensor, torch.empty(0)) for tensor in tensors], lambda tensor, view: True)
    with (
        tensors[0].file.open("rb", buffering=0) as stream,
        BackgroundReads(lambda run: told.extend(run.tensors)) as reads,
    ):
        for run in runs:
            reads.add(stream, run, [memoryview(targets[tensor.name]) for tensor in run.tensors])
        if interruption is not None:
            raise interruption
    assert told == list(tensors)
    return list(targets.values())


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


@pytest.mark.parametrize("most", [1, 7, 4096])
def test_a_system_that_gives_less_than_was_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    whole = os.preadv

    def less(descriptor: int, buffers: Sequence[memoryview], position: int) -> int:
        taken: list[memoryview] = []
        for buffer in buffers:
            taken.append(buffer[: most - sum(map(len, taken))])
        return whole(descriptor, taken, position)

    monkeypatch.setattr(os, "preadv", less)
    targets = read_all(stored_in(tmp_path / "f.safetensors", 100))
    assert [bytes(target) for target in targets] == [bytes([number]) * 100 for number in range(COUNT)]
