"""Checks beside the reading: all are made, the first damaged tensor is told, and no thread is left."""

import hashlib
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from model_shards.errors import CheckpointError
from model_shards.weights.background import BackgroundChecks
from model_shards.weights.header import StoredTensor


def stored(name: str, data: bytes, sha256: str | None) -> StoredTensor:
    return StoredTensor(name, Path("f.safetensors"), torch.uint8, (len(data),), 0, len(data), sha256)


def good(name: str, data: bytes) -> StoredTensor:
    return stored(name, data, hashlib.sha256(data).hexdigest())


def check_all(tensors: Sequence[StoredTensor], data: bytes, interruption: BaseException | None = None) -> None:
    """Leaves by `interruption`, if there is one, once all are added."""
    with BackgroundChecks() as checks:
        for tensor in tensors:
            checks.add(tensor, memoryview(data))
        if interruption is not None:
            raise interruption


def checking_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("check-weights")]


@pytest.mark.parametrize("damaged", [0, 7, 19])
def test_a_damaged_tensor_is_told_wherever_it_stands(damaged: int) -> None:
    data = b"data"
    tensors = [good(f"t{number}", b"other" if number == damaged else data) for number in range(20)]
    with pytest.raises(CheckpointError, match=rf"tensor t{damaged} must have"):
        check_all(tensors, data)
    assert checking_threads() == []


def test_sound_tensors_and_those_without_a_sum_pass() -> None:
    check_all([good("a", b"data"), stored("b", b"data", None)] * 10, b"data")
    assert checking_threads() == []


def test_an_error_of_the_reader_is_not_hidden_by_one_of_a_check() -> None:
    with pytest.raises(KeyboardInterrupt):
        check_all([good("a", b"other")], b"data", KeyboardInterrupt())
    assert checking_threads() == []
