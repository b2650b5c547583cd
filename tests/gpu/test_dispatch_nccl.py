"""Dispatch and combine on CUDA devices."""

import pytest
import torch

from cluster.dispatch import LocalDispatcher, StepPlan
from cluster.dispatch.transport import DirectTransport, Lane
from cluster.membership import Membership
from cluster.process_group import open_epoch
from cluster.rendezvous import connect_rendezvous, serve_rendezvous
from cluster.topology import Topology
from model_shards.placement import contiguous_placement
from tests.dispatch_cell import NUM_EXPERTS, Case, FakeShard, check_reports, rank_functions
from tests.ranks import run_ranks, values

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def cases(num_attention: int, num_expert: int) -> tuple[Case, ...]:
    return tuple(
        Case(num_attention, num_expert, num_micro_batches, dtype)
        for num_micro_batches in (1, 2, 3)
        for dtype in (torch.float32, torch.bfloat16)
    )


@pytest.mark.parametrize("topology", [(1, 1), (1, 3), (2, 4), (3, 2)])
def test_nccl_answers_like_the_slow_reference(topology):
    # NCCL puts no two ranks on one GPU.
    if torch.cuda.device_count() < sum(topology):
        pytest.skip(f"{sum(topology)} ranks need as many GPUs, found {torch.cuda.device_count()}")
    server = serve_rendezvous("127.0.0.1")
    results = run_ranks(rank_functions(server.rendezvous, cases(*topology), "nccl", "cuda"), deadline_s=250)
    check_reports(cases(*topology), [report for reports in values(results) for report in reports])


def test_nccl_groups_of_one_rank_open_exchange_and_close_again_and_again():
    """What one GPU can show of NCCL: two ranks need two."""
    device = torch.device("cuda", 0)
    placement = contiguous_placement(1, 1)
    for epoch in (1, 2, 3):
        server = serve_rendezvous("127.0.0.1")
        membership = Membership(epoch, _Alone(), placement, server.rendezvous, "nccl", 60.0, 30.0)
        store = connect_rendezvous(server.rendezvous, 30.0)
        with open_epoch(membership, 0, device, store) as groups:
            sent = torch.arange(64, dtype=torch.uint8, device=device)
            received = torch.zeros_like(sent)
            lane = Lane(sent, received, [64], [64])
            carrier = DirectTransport(groups.data).carrier(lane)
            carrier.start()
            carrier.end()
            assert torch.equal(received, sent)


class _Alone(Topology):
    """A topology of one rank, which no cell has: A0 and nobody else."""

    def __init__(self) -> None:
        super().__init__(1, 1)

    @property
    def world_size(self) -> int:
        return 1


def test_gloo_carries_cuda_tensors_of_ranks_that_share_a_gpu():
    server = serve_rendezvous("127.0.0.1")
    results = run_ranks(rank_functions(server.rendezvous, cases(2, 2), "gloo", "cuda:0"), deadline_s=250)
    check_reports(cases(2, 2), [report for reports in values(results) for report in reports])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_local_dispatcher_answers_alike_on_cuda_and_cpu(dtype):
    placement = contiguous_placement(NUM_EXPERTS, 3)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(50, 16, generator=generator).to(dtype)
    weights, ids = torch.rand(50, NUM_EXPERTS, generator=generator).topk(4, dim=1)
    results = []
    for device in (torch.device("cpu"), torch.device("cuda")):
        dispatcher = LocalDispatcher([FakeShard(experts) for experts in placement.shards], placement, device)
        dispatcher.begin_step(StepPlan(1, ((50,),)))
        pending = dispatcher.routed(0).dispatch(2, hidden.to(device), ids.to(device), weights.to(device))
        results.append(pending.wait().cpu())
        assert sum(dispatcher.rows_sent) >= 50
    torch.testing.assert_close(results[1], results[0])


def test_dispatch_on_the_attention_side_does_not_wait_for_the_gpu():
    placement = contiguous_placement(NUM_EXPERTS, 3)
    device = torch.device("cuda")
    dispatcher = LocalDispatcher([FakeShard(experts) for experts in placement.shards], placement, device)
    dispatcher.begin_step(StepPlan(1, ((8,),)))
    hidden, weights = torch.randn(8, 16, device=device), torch.rand(8, 2, device=device)
    ids = torch.tensor([[0, 5]] * 8, device=device)
    dispatcher.routed(0).dispatch(2, hidden, ids, weights).wait()  # moves the tables of the fake shards
    shards_on_device = [FakeShard(experts) for experts in placement.shards]
    for shard in shards_on_device:
        shard._factors = shard._factors.to(device)
    dispatcher = LocalDispatcher(shards_on_device, placement, device)
    dispatcher.begin_step(StepPlan(1, ((8,),)))
    torch.cuda.set_sync_debug_mode("error")
    try:
        dispatcher.routed(0).dispatch(2, hidden, ids, weights).wait()
    finally:
        torch.cuda.set_sync_debug_mode("default")
