"""Dispatch and combine between spawned processes, over gloo and over shared memory."""

import os
import signal
import time
from functools import partial

import pytest
import torch

from cluster.dispatch import StepPlan, make_attention_dispatcher, make_expert_dispatcher
from cluster.membership import Rendezvous
from cluster.process_group import open_epoch
from cluster.rendezvous import connect_rendezvous, serve_rendezvous
from cluster.topology import Role
from model_shards.errors import EpochAbortedError
from model_shards.pipeline import run_micro_batches
from tests.dispatch_cell import (
    CONFIG,
    Case,
    FakeShard,
    check_reports,
    exchange_only,
    membership_of,
    rank_functions,
    run_rank_epoch,
    with_deadlines,
)
from tests.ranks import run_ranks, values

CPU = torch.device("cpu")
TOPOLOGIES = ((1, 1), (1, 3), (2, 4), (3, 2))


@pytest.mark.parametrize("backend", ["gloo", "shm"])
def test_every_topology_and_number_of_micro_batches_answers_like_the_slow_reference(backend):
    # One set of processes goes through all epochs: a process must be able to open and close them again and again.
    cases = tuple(
        Case(num_attention, num_expert, num_micro_batches, dtype)
        for num_attention, num_expert in TOPOLOGIES
        for num_micro_batches in (1, 2, 3)
        for dtype in (torch.float32, torch.bfloat16)
    )
    server = serve_rendezvous("127.0.0.1")
    results = run_ranks(rank_functions(server.rendezvous, cases, backend, "cpu"), deadline_s=200)
    check_reports(cases, [report for reports in values(results) for report in reports])


class _FaultyShard(FakeShard):
    """Dies or stalls in its third call: the middle of a step."""

    def __init__(self, experts: tuple[int, ...], fault: str) -> None:
        super().__init__(experts)
        self._fault = fault
        self._calls = 0

    def forward(self, layer, hidden, local_ids, weights):
        self._calls += 1
        if self._calls == 3:
            if self._fault == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(6)
        return super().forward(layer, hidden, local_ids, weights)


def _survive(rendezvous: Rendezvous, backend: str, fault: str, index: int) -> tuple[str, float, float]:
    """Ranks A0 A1 E0 E1; E1 is faulty. The error each rank met, seconds to it, seconds to close."""
    # Only a rank that stalls is met by the deadline: where one dies, a busy machine must not be taken for it.
    membership = with_deadlines(membership_of(rendezvous, 1, 2, 2, backend), 60.0, 2.0 if fault == "stalls" else 20.0)
    store = connect_rendezvous(rendezvous, 60.0)
    groups = open_epoch(membership, index, CPU, store)
    plan = StepPlan(1, ((3, 4), (5, 6)))
    start = time.monotonic()
    try:
        if membership.topology.role(index) is Role.EXPERT:
            expert = make_expert_dispatcher(groups, membership, index - 2, CONFIG, torch.float32, CPU)
            experts = membership.placement.shards[index - 2]
            expert.run_step(plan, _FaultyShard(experts, fault) if index == 3 else FakeShard(experts))
        else:
            attention = make_attention_dispatcher(groups, membership, index, CONFIG, torch.float32, CPU)
            attention.begin_step(plan)
            run_micro_batches(
                [
                    exchange_only(routed, f"{index}/{i}", plan.tokens[index][i], torch.float32, CPU)
                    for i in range(2)
                    if (routed := attention.routed(i)) is not None
                ]
            )
        message = "no error"
    except EpochAbortedError as error:
        message = str(error)
    failed = time.monotonic()
    groups.close()
    groups.close()
    closed = time.monotonic()
    if index < 3:
        # The survivors go on in an epoch of their own.
        assert run_rank_epoch(membership_of(rendezvous, 2, 2, 1, backend), index, 2, 3, torch.float32, "cpu").epoch == 2
    return message, failed - start, closed - failed


@pytest.mark.parametrize("backend", ["gloo", "shm"])
@pytest.mark.parametrize("fault", ["dies", "stalls"])
def test_a_rank_lost_in_a_step_aborts_the_epoch_on_all_survivors_and_they_go_on_in_the_next(fault, backend):
    server = serve_rendezvous("127.0.0.1")
    ranks = [partial(_survive, server.rendezvous, backend, fault, index) for index in range(4)]
    results = run_ranks(ranks, deadline_s=120)
    survivors = results[:3] if fault == "dies" else results
    if fault == "dies":
        assert results[3].exit_code == -signal.SIGKILL
    for message, to_error_s, to_close_s in values(survivors):
        assert "of layer " in message
        assert "epoch 1 on rank " in message
        assert to_error_s < (5 if fault == "dies" else 10)
        assert to_close_s < 1
