"""The cores that a rank takes, and what its process has in its environment."""

import os
from pathlib import Path

import pytest

from cluster import device
from cluster.cell import _rank_environment
from cluster.device import RANK_ENVIRONMENT, available_cores, meanwhile_threads, num_threads
from cluster.topology import Role, Topology


@pytest.mark.parametrize(
    ("topology", "cores", "attention", "expert"),
    [((1, 2), 2, 2, 1), ((2, 2), 2, 1, 1), ((1, 1), 8, 8, 8), ((3, 2), 8, 2, 4), ((4, 8), 2, 1, 1)],
)
def test_ranks_of_one_role_share_the_cores_and_each_has_one(topology, cores, attention, expert):
    shape = Topology(*topology)
    assert num_threads(shape, Role.ATTENTION, cores) == attention
    assert num_threads(shape, Role.EXPERT, cores) == expert


@pytest.mark.parametrize(
    ("topology", "cores", "threads"), [((1, 2), 2, 1), ((1, 1), 2, 1), ((1, 2), 16, 5), ((4, 8), 2, 1)]
)
def test_while_all_ranks_compute_all_share_the_cores(topology, cores, threads):
    assert meanwhile_threads(Topology(*topology), cores) == threads


@pytest.mark.parametrize(
    ("limit", "cores"),
    [("max 100000", 8), ("400000 100000", 4), ("50000 100000", 1), ("900000 100000", 8), (None, 8)],
)
def test_a_containers_limit_bounds_the_cores(tmp_path: Path, monkeypatch, limit, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    file = tmp_path / "cpu.max"
    if limit is not None:
        file.write_text(limit + "\n")
    monkeypatch.setattr(device, "_CPU_LIMIT", file)
    assert available_cores() == cores


def test_a_rank_gets_its_environment_and_what_the_operator_set_stays(monkeypatch):
    for name in RANK_ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    with _rank_environment():
        assert {name: os.environ[name] for name in RANK_ENVIRONMENT} == {
            **RANK_ENVIRONMENT,
            "OMP_WAIT_POLICY": "ACTIVE",
        }
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"
    assert not {"GOMP_SPINCOUNT", "GLIBC_TUNABLES"} & os.environ.keys()
