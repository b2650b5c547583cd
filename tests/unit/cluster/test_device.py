"""The cores that a rank takes, and what its process has in its environment."""

import os
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cluster import device
from cluster.cell import _rank_environment
from cluster.device import (
    RANK_ENVIRONMENT,
    available_cores,
    may_pin,
    meanwhile_threads,
    num_threads,
    own_cores,
    pin_threads,
    use_threads,
)
from cluster.topology import Role, Topology
from model_shards.kernels.machine_code import on_each_thread


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


def test_ranks_of_a_role_are_dealt_to_the_cores_in_order():
    assert [own_cores([3, 5, 6, 7], index, 2) for index in range(3)] == [[3, 5], [6, 7], [3, 5]]


@pytest.mark.parametrize(
    ("topology", "role", "mask", "cores", "shrinks", "may"),
    [
        ((1, 2), Role.ATTENTION, 2, 2, False, True),
        ((1, 2), Role.EXPERT, 2, 2, False, True),
        ((1, 2), Role.ATTENTION, 8, 2, False, False),  # a limit: which 2 of the 8 cores are idle is not known
        ((1, 2), Role.ATTENTION, 16, 16, False, True),
        ((1, 2), Role.ATTENTION, 16, 16, True, False),  # a team of 16 would shrink to 5 in every layer
        ((3, 3), Role.EXPERT, 2, 2, False, False),  # two of three would share a core
        ((5, 2), Role.ATTENTION, 8, 8, False, False),  # 3 cores would be left, to which nobody could go
    ],
)
def test_threads_stay_on_cores_only_where_that_is_known_to_do_no_harm(
    monkeypatch, topology, role, mask, cores, shrinks, may
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(mask)))
    for name in device._PLACES:
        monkeypatch.delenv(name, raising=False)
    assert may_pin(Topology(*topology), role, cores, shrinks) is may
    monkeypatch.setenv("OMP_PROC_BIND", "false")
    assert not may_pin(Topology(*topology), role, cores, shrinks)


def test_a_pinned_team_has_a_thread_on_each_core_and_can_be_set_free_again(monkeypatch):
    everywhere = sorted(os.sched_getaffinity(os.getpid()))
    if len(everywhere) < 2:
        pytest.skip("one core leaves nothing to choose")
    spec = SimpleNamespace(device="cpu", topology=Topology(1, 1))
    monkeypatch.setattr(device, "available_cores", lambda: 2)
    monkeypatch.setattr(device, "may_pin", lambda *_: True)
    seen: dict[str, object] = {}

    def compute():
        use_threads(spec, Role.ATTENTION)
        pin_threads(spec, Role.ATTENTION, 0)
        seen["pinned"] = places()
        use_threads(spec, Role.ATTENTION)
        seen["free"] = places()

    def places() -> dict[int, set[int]]:
        team: dict[int, set[int]] = {}
        on_each_thread(lambda thread: team.update({thread: os.sched_getaffinity(0)}), 2)
        return team

    before = torch.get_num_threads()
    thread = threading.Thread(target=compute)
    thread.start()
    thread.join(60.0)
    torch.set_num_threads(before)  # a thread that comes first takes the last number over
    assert seen["pinned"] == {0: {everywhere[0]}, 1: {everywhere[1]}}
    assert seen["free"] == {0: set(everywhere), 1: set(everywhere)}
    assert os.sched_getaffinity(os.getpid()) == set(everywhere)
