"""What the disk is asked for while tensors are read, and which files are open meanwhile."""

import os
from pathlib import Path

import psutil
import pytest
import torch

from model_shards.errors import CheckpointError
from model_shards.weights.header import StoredTensor
from model_shards.weights.reading import AHEAD_BYTES, ReadAhead
from model_shards.weights.runs import Run

pytestmark = pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="a system without posix_fadvise")


SIZES = [1, AHEAD_BYTES // 4, AHEAD_BYTES // 2, AHEAD_BYTES, 3 * AHEAD_BYTES, 5, AHEAD_BYTES // 3, 7]


@pytest.fixture
def runs(tmp_path) -> list[Run]:
    """Of many sizes, in three files, with bytes of somebody else's between."""
    made = []
    for index, size in enumerate(SIZES):
        file = tmp_path / f"weights-{index // 3}"
        file.write_bytes(b"\0" * 100)
        start = sum(SIZES[index // 3 * 3 : index]) + 10 * index
        tensor = StoredTensor(f"t{index}", file, torch.uint8, (size,), start, size)
        made.append(Run(file, start, size, [tensor], [torch.empty(0)], as_stored=True))
    return made


def open_files(directory: Path) -> list[str]:
    return sorted(
        Path(file.path).name for file in psutil.Process().open_files() if directory in Path(file.path).parents
    )


def test_each_run_is_asked_for_once_before_it_is_read_and_not_too_far_ahead(monkeypatch, runs) -> None:
    asked: list[tuple[Path, int, int]] = []

    def advise(descriptor: int, start: int, count: int, advice: int) -> None:
        asked.append((Path(os.readlink(f"/proc/self/fd/{descriptor}")), start, count))

    monkeypatch.setattr(os, "posix_fadvise", advise)
    unread = 0
    with ReadAhead(runs) as ahead:
        for index, run in enumerate(runs):
            before = len(asked)
            stream = ahead.begin(run)
            assert Path(str(stream.name)) == run.file
            assert (run.file, run.start, run.num_bytes) in asked
            for _, start, count in asked[before:]:
                # One more is asked for only while less than that is on its way.
                assert unread < AHEAD_BYTES, start
                unread += count
            assert unread >= AHEAD_BYTES or len(asked) == len(runs), f"idle at {index}"
            unread -= run.num_bytes
    assert asked == [(run.file, run.start, run.num_bytes) for run in runs]


def test_a_file_is_open_from_when_it_is_asked_for_until_the_next_one_was_read_from(tmp_path, runs) -> None:
    seen = []
    with ReadAhead(runs) as ahead:
        for run in runs:
            ahead.begin(run)
            seen.append(open_files(tmp_path))
            ahead.end(run)
    first, second, third = ([f"weights-{number}"] for number in range(3))
    # The fourth and the fifth are each as large as what is asked for ahead.
    assert seen == [first + second] * 4 + [second, second + third, second + third, third]
    assert open_files(tmp_path) == []


def test_a_file_that_is_gone_closes_the_others(tmp_path, runs) -> None:
    runs[-1].file.unlink()

    def read_all() -> None:
        with ReadAhead(runs) as ahead:
            for run in runs:
                ahead.begin(run)

    with pytest.raises(CheckpointError, match="weights-2 cannot be read: No such file"):
        read_all()
    assert open_files(tmp_path) == []


def test_advice_that_is_not_taken_is_no_error(monkeypatch, runs) -> None:
    def refuse(*_: int) -> None:
        raise OSError("not on this file system")

    monkeypatch.setattr(os, "posix_fadvise", refuse)
    with ReadAhead(runs) as ahead:
        ahead.begin(runs[0])
