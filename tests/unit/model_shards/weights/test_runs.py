"""Tensors that lie one behind the other are read together, and no others."""

import os
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model_shards.weights import runs
from model_shards.weights.header import StoredTensor
from model_shards.weights.runs import Run, runs_of

BOUND = 50
# (file, bytes of somebody else's before it, its own bytes, whether the view takes them as they are)
PLACES = st.lists(
    st.tuples(st.sampled_from("ab"), st.sampled_from([0, 0, 0, 3]), st.sampled_from([0, 1, 20, 70]), st.booleans()),
    max_size=30,
)


def made(places: list[tuple[str, int, int, bool]]) -> dict[str, tuple[StoredTensor, torch.Tensor, bool]]:
    ends = {"a": 8, "b": 8}
    jobs = {}
    for index, (file, gap, size, direct) in enumerate(places):
        start = ends[file] + gap
        ends[file] = start + size
        tensor = StoredTensor(f"t{index}", Path(file), torch.uint8, (size,), start, size)
        jobs[tensor.name] = (tensor, torch.full((1,), index), direct)
    return jobs


def joinable(before: Run, after: Run) -> bool:
    return (
        before.as_stored
        and after.as_stored
        and before.file == after.file
        and before.start + before.num_bytes == after.start
        and before.num_bytes < BOUND
    )


@given(places=PLACES, seed=st.randoms())
def test_all_tensors_once_in_the_order_of_the_files_and_joined_when_they_adjoin(places, seed) -> None:
    jobs = made(places)
    shuffled = [(tensor, view) for tensor, view, _ in jobs.values()]
    seed.shuffle(shuffled)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "RUN_BYTES", BOUND)
        found = runs_of(shuffled, lambda tensor, view: jobs[tensor.name][2])
    assert sorted(tensor.name for run in found for tensor in run.tensors) == sorted(jobs)
    assert [(run.file.name, run.start) for run in found] == sorted((run.file.name, run.start) for run in found)
    for run in found:
        assert run.file == run.tensors[0].file
        assert run.start == run.tensors[0].start
        assert run.num_bytes == sum(tensor.num_bytes for tensor in run.tensors)
        assert sum(tensor.num_bytes for tensor in run.tensors[:-1]) < BOUND
        for tensor, view in zip(run.tensors, run.views, strict=True):
            assert view is jobs[tensor.name][1]
            assert run.as_stored == jobs[tensor.name][2]
        for before, after in pairwise(run.tensors):
            assert (before.file, before.start + before.num_bytes) == (after.file, after.start)
        assert run.as_stored or len(run.tensors) == 1
    assert not any(joinable(before, after) for before, after in pairwise(found))


def test_no_run_has_more_tensors_than_the_system_takes() -> None:
    jobs = made([("a", 0, 1, True)] * 2000)
    found = runs_of([(tensor, view) for tensor, view, _ in jobs.values()], lambda tensor, view: True)
    assert [len(run.tensors) for run in found] == [512, 512, 512, 464]
    assert len(found[0].tensors) <= os.sysconf("SC_IOV_MAX")
