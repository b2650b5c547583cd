"""What the disk is asked for while tensors are read."""

import os

import pytest
import torch

from model_shards.weights.header import StoredTensor
from model_shards.weights.reading import AHEAD_BYTES, ReadAhead

pytestmark = pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="a system without posix_fadvise")


@pytest.fixture
def tensors(tmp_path) -> list[StoredTensor]:
    """Of many sizes, with bytes of somebody else's between."""
    file = tmp_path / "weights"
    file.write_bytes(b"\0" * 100)
    sizes = [1, AHEAD_BYTES // 4, AHEAD_BYTES // 2, AHEAD_BYTES, 3 * AHEAD_BYTES, 5, AHEAD_BYTES // 3, 7]
    starts = [sum(sizes[:index]) + 10 * index for index in range(len(sizes))]
    return [
        StoredTensor(f"t{index}", file, torch.uint8, (size,), start, size)
        for index, (size, start) in enumerate(zip(sizes, starts, strict=True))
    ]


def test_each_tensor_is_asked_for_once_before_it_is_read_and_not_too_far_ahead(monkeypatch, tensors) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _, start, count, advice: asked.append((start, count)))
    unread = 0
    with tensors[0].file.open("rb", buffering=0) as stream:
        ahead = ReadAhead(stream, tensors)
        for index, tensor in enumerate(tensors):
            before = len(asked)
            ahead.reading(tensor)
            assert (tensor.start, tensor.num_bytes) in asked
            for start, count in asked[before:]:
                # One more is asked for only while less than that is on its way.
                assert unread < AHEAD_BYTES, start
                unread += count
            assert unread >= AHEAD_BYTES or len(asked) == len(tensors), f"idle at {index}"
            unread -= tensor.num_bytes
    assert asked == [(tensor.start, tensor.num_bytes) for tensor in tensors]


def test_advice_that_is_not_taken_is_no_error(monkeypatch, tensors) -> None:
    def refuse(*_: int) -> None:
        raise OSError("not on this file system")

    monkeypatch.setattr(os, "posix_fadvise", refuse)
    with tensors[0].file.open("rb", buffering=0) as stream:
        ReadAhead(stream, tensors).reading(tensors[0])
