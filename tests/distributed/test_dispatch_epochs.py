"""Joining and leaving epochs; the ranks are threads of this process."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import psutil
import pytest
import torch

from cluster import process_group
from cluster.membership import Rendezvous
from cluster.process_group import EpochGroups, check_backend, open_epoch
from cluster.rendezvous import connect_rendezvous, serve_rendezvous
from model_shards.errors import ConfigError, EpochAbortedError
from tests.dispatch_cell import membership_of, run_rank_epoch, with_deadlines

CPU = torch.device("cpu")


def open_all(rendezvous: Rendezvous, epoch: int, backend: str = "gloo") -> list[EpochGroups]:
    """Opens a (1, 2) epoch on three threads."""
    membership = membership_of(rendezvous, epoch, 1, 2, backend)

    def join(rank: int) -> EpochGroups:
        return open_epoch(membership, rank, CPU, connect_rendezvous(rendezvous, 30))

    with ThreadPoolExecutor(3) as pool:
        return list(pool.map(join, range(3)))


def test_a_rank_that_never_joins_is_named():
    server = serve_rendezvous("127.0.0.1")
    membership = with_deadlines(membership_of(server.rendezvous, 4, 1, 2), 0.5, 1.0)
    store = connect_rendezvous(server.rendezvous, 10)
    start = time.monotonic()
    with pytest.raises(EpochAbortedError, match=r"rank A0 could not join epoch 4 within 0.5 s; missing: E0, E1 \("):
        open_epoch(membership, 0, CPU, store)
    assert time.monotonic() - start < 5


def test_a_rank_that_joins_an_epoch_counts_for_no_other_epoch():
    server = serve_rendezvous("127.0.0.1")
    for group in open_all(server.rendezvous, 1):
        group.close()
    membership = with_deadlines(membership_of(server.rendezvous, 2, 1, 2), 0.3, 1.0)
    with pytest.raises(EpochAbortedError, match="missing: A0, E1"):
        open_epoch(membership, 1, CPU, connect_rendezvous(server.rendezvous, 10))


def test_a_rendezvous_that_is_gone_is_named():
    server = serve_rendezvous("127.0.0.1")
    rendezvous = server.rendezvous
    del server
    with pytest.raises(EpochAbortedError, match=f"127.0.0.1:{rendezvous.port} did not answer within 1 s"):
        connect_rendezvous(rendezvous, 1)


def test_ranks_of_one_host_share_memory_unless_one_of_them_cannot(monkeypatch):
    server = serve_rendezvous("127.0.0.1")
    shared = open_all(server.rendezvous, 1, "auto")
    assert all(groups.mesh is not None and groups.data is None and groups.control is None for groups in shared)
    for groups in shared:
        groups.close()

    real = process_group.Mesh

    def one_is_refused(outbox, addresses, me, names):
        if me == 2:
            raise PermissionError(13, "Permission denied", "/proc/1/fd/7")
        return real(outbox, addresses, me, names)

    monkeypatch.setattr(process_group, "Mesh", one_is_refused)
    over_gloo = open_all(server.rendezvous, 2, "auto")
    assert all(groups.mesh is None and groups.data is not None and groups.control is not None for groups in over_gloo)
    for groups in over_gloo:
        groups.close()
    with pytest.raises(ConfigError, match=r"the backend shm cannot be had, .*Permission denied: '/proc/1/fd/7'"):
        open_all(server.rendezvous, 3, "shm")

    monkeypatch.setattr(process_group, "supported", lambda: False)
    without = open_all(server.rendezvous, 4, "auto")
    assert all(groups.mesh is None for groups in without)
    for groups in without:
        groups.close()


def test_a_start_that_fails_half_way_closes_what_it_had_built(monkeypatch):
    server = serve_rendezvous("127.0.0.1")
    built = []
    real = process_group._open_gloo

    def second_fails(membership, global_rank, store, timeout_s):
        if threading.current_thread() not in owners:
            owners.append(threading.current_thread())
            built.append(real(membership, global_rank, store, timeout_s))
            return built[-1]
        raise RuntimeError("no memory for the data group")

    owners: list[threading.Thread] = []
    monkeypatch.setattr(process_group, "_open_gloo", second_fails)
    with pytest.raises(EpochAbortedError, match="no memory for the data group"):
        open_all(server.rendezvous, 1)
    assert built
    for group in built:
        with pytest.raises(RuntimeError):
            group.barrier().wait()


def test_closing_twice_is_no_error_and_ends_what_a_peer_waits_for():
    server = serve_rendezvous("127.0.0.1")
    first, *others = open_all(server.rendezvous, 1)
    waiting = first.control.barrier()
    start = time.monotonic()
    for group in others:
        group.close()
        group.close()
    with pytest.raises(RuntimeError):
        waiting.wait()
    first.close()
    assert time.monotonic() - start < 5


def test_closing_ends_the_exchanges_that_this_rank_itself_waits_for():
    server = serve_rendezvous("127.0.0.1")
    first, *others = open_all(server.rendezvous, 1)
    waiting = [first.control.barrier(), first.data.barrier()]
    start = time.monotonic()
    first.close()
    for work in waiting:
        with pytest.raises(RuntimeError):
            work.wait()
    for group in others:
        with pytest.raises(RuntimeError):
            group.data.barrier().wait()
        group.close()
    assert time.monotonic() - start < 5


def test_epochs_open_and_close_over_and_over_with_ranks_as_threads():
    server = serve_rendezvous("127.0.0.1")
    for epoch in range(1, 6):
        membership = membership_of(server.rendezvous, epoch, 1, 2)
        with ThreadPoolExecutor(3) as pool:
            futures = [pool.submit(run_rank_epoch, membership, rank, 2, 2, torch.float32, "cpu") for rank in range(3)]
            assert [future.result(60).global_rank for future in futures] == [0, 1, 2]


def test_ranks_of_a_loopback_rendezvous_listen_on_loopback_alone():
    def listening() -> set[tuple[str, int]]:
        connections = psutil.Process().net_connections("tcp")
        return {(c.laddr.ip, c.laddr.port) for c in connections if c.status == psutil.CONN_LISTEN}

    before = listening()
    server = serve_rendezvous("127.0.0.1")
    groups = open_all(server.rendezvous, 1)
    opened = listening() - before
    for group in groups:
        group.close()
    assert ("127.0.0.1", server.rendezvous.port) in opened
    assert len(opened) > 1  # gloo's own
    assert {ip for ip, _ in opened} == {"127.0.0.1"}


def test_a_blocked_wait_on_one_connection_lets_another_set_the_key():
    server = serve_rendezvous("127.0.0.1")
    waiting, ringing = (connect_rendezvous(server.rendezvous, 10) for _ in range(2))
    with ThreadPoolExecutor(1) as pool:
        waited = pool.submit(waiting.wait, ["bell"], timedelta(seconds=10))
        time.sleep(0.1)
        assert not waited.done()
        ringing.set("bell", "1")
        waited.result(5)


def test_a_backend_that_cannot_carry_the_device_is_refused():
    with pytest.raises(ConfigError, match="auto, gloo, nccl, shm, got 'mpi'"):
        check_backend("mpi", CPU)
    with pytest.raises(ConfigError, match="nccl needs a cuda device, got cpu"):
        check_backend("nccl", CPU)
    with pytest.raises(ConfigError, match="shm needs a cpu device, got cuda"):
        check_backend("shm", torch.device("cuda"))
