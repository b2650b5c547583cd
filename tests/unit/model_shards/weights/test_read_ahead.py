"""What the disk is asked for while tensors are read, and which files are open meanwhile."""

import os
from pathlib import Path

import psutil
import pytest
import torch

from model_shards.errors import CheckpointError
from model_shards.weights.header import StoredTensor
from model_shards.weights.reading import AHEAD_BYTES, ReadAhead

pytestmark = pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="a system without posix_fadvise")


SIZES = [1, AHEAD_BYTES // 4, AHEAD_BYTES // 2, AHEAD_BYTES, 3 * AHEAD_BYTES, 5, AHEAD_BYTES // 3, 7]


@pytest.fixture
def tensors(tmp_path) -> list[StoredTensor]:
    """Of many sizes, in three files, with bytes of somebody else's between."""
    made = []
    for index, size in enumerate(SIZES):
        file = tmp_path / f"weights-{index // 3}"
        file.write_bytes(b"\0" * 100)
        start = sum(SIZES[index // 3 * 3 : index]) + 10 * index
        made.append(StoredTensor(f"t{index}", file, torch.uint8, (size,), start, size))
    return made


def open_files(directory: Path) -> list[str]:
    return sorted(
        Path(file.path).name for file in psutil.Process().open_files() if directory in Path(file.path).parents
    )


def test_each_tensor_is_asked_for_once_before_it_is_read_and_not_too_far_ahead(monkeypatch, tensors) -> None:
    asked: list[tuple[Path, int, int]] = []

    def advise(descriptor: int, start: int, count: int, advice: int) -> None:
        asked.append((Path(os.readlink(f"/proc/self/fd/{descriptor}")), start, count))

    monkeypatch.setattr(os, "posix_fadvise", advise)
    unread = 0
    with ReadAhead(tensors) as ahead:
        for index, tensor in enumerate(tensors):
            before = len(asked)
            stream = ahead.begin(tensor)
            assert Path(str(stream.name)) == tensor.file
            assert (tensor.file, tensor.start, tensor.num_bytes) in asked
            for _, start, count in asked[before:]:
                # One more is asked for only while less than that is on its way.
                assert unread < AHEAD_BYTES, start
                unread += count
            assert unread >= AHEAD_BYTES or len(asked) == len(tensors), f"idle at {index}"
            unread -= tensor.num_bytes
    assert asked == [(tensor.file, tensor.start, tensor.num_bytes) for tensor in tensors]


def test_a_file_is_open_from_when_it_is_asked_for_until_the_next_one_was_read_from(tmp_path, tensors) -> None:
    seen = []
    with ReadAhead(tensors) as ahead:
        for tensor in tensors:
            ahead.begin(tensor)
            seen.append(open_files(tmp_path))
            ahead.end(tensor)
    first, second, third = ([f"weights-{number}"] for number in range(3))
    # The fourth and the fifth are each as large as what is asked for ahead.
    assert seen == [first + second] * 4 + [second, second + third, second + third, third]
    assert open_files(tmp_path) == []


def test_a_file_that_is_gone_closes_the_others(tmp_path, tensors) -> None:
    tensors[-1].file.unlink()

    def read_all() -> None:
        with ReadAhead(tensors) as ahead:
            for tensor in tensors:
                ahead.begin(tensor)

    with pytest.raises(CheckpointError, match="weights-2 cannot be read: No such file"):
        read_all()
    assert open_files(tmp_path) == []


def test_advice_that_is_not_taken_is_no_error(monkeypatch, tensors) -> None:
    def refuse(*_: int) -> None:
        raise OSError("not on this file system")

    monkeypatch.setattr(os, "posix_fadvise", refuse)
    with ReadAhead(tensors) as ahead:
        ahead.begin(tensors[0])
