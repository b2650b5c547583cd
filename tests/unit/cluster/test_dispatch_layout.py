"""Rows, segments and sums, against plain loops over tokens and experts.

Shapes: T tokens, N shards, K experts per token, E experts, H hidden size.
"""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.dispatch.base import StepPlan
from cluster.dispatch.fence import DeviceFence, Fence, HostFence
from cluster.dispatch.layout import DispatchSegments, RowShape, local_id_table, pack_rows, sum_rows
from cluster.dispatch.local import LocalDispatcher
from model_shards.errors import EpochAbortedError
from model_shards.placement import ExpertPlacement, contiguous_placement
from tests.dispatch_cell import FakeShard, slow_moe

CPU = torch.device("cpu")


def packed(
    placement: ExpertPlacement, topk_ids: torch.Tensor, hidden: torch.Tensor, weights: torch.Tensor
) -> tuple[DispatchSegments, torch.Tensor]:
    """The segments for all shards, and the counts; they lie in memory in which every float is NaN."""
    shape = RowShape(hidden.shape[1], topk_ids.shape[1], hidden.dtype)
    num_tokens, num_shards = hidden.shape[0], placement.num_shards
    memory = torch.full((num_shards * shape.dispatch_bytes(num_tokens),), 255, dtype=torch.uint8)
    segments = shape.dispatch_segments(memory, num_tokens, num_shards)
    counts = pack_rows(local_id_table(placement, CPU), hidden, topk_ids, weights, segments)
    return segments, counts


@st.composite
def routings(draw, fewest_tokens=0):
    """A placement and a routing; skewed ones included: all tokens to few experts, shards without a token."""
    num_experts = draw(st.integers(1, 12))
    order = draw(st.permutations(range(num_experts)))
    cuts = sorted(draw(st.sets(st.integers(1, num_experts - 1), max_size=5))) if num_experts > 1 else []
    bounds = [0, *cuts, num_experts]
    placement = ExpertPlacement(num_experts, tuple(tuple(order[a:b]) for a, b in itertools.pairwise(bounds)))
    top_k = draw(st.integers(1, min(4, num_experts)))
    allowed = draw(st.lists(st.integers(0, num_experts - 1), min_size=top_k, max_size=num_experts, unique=True))
    rows = st.permutations(allowed).map(lambda ids: ids[:top_k])
    ids = draw(st.lists(rows, min_size=fewest_tokens, max_size=9))
    topk_ids = torch.tensor(ids, dtype=torch.int64).reshape(len(ids), top_k)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    hidden = torch.randn(len(ids), draw(st.integers(1, 7)), generator=generator)
    weights = torch.rand(len(ids), top_k, generator=generator)
    return placement, topk_ids, hidden, weights


@given(routings(1))
@settings(deadline=None, max_examples=150)
def test_a_shard_is_told_which_of_its_experts_each_token_visits(routing):
    placement, topk_ids, hidden, weights = routing
    segments, counts = packed(placement, topk_ids, hidden, weights)
    for shard, experts in enumerate(placement.shards):
        expected = [[experts.index(e) if e in experts else -1 for e in ids] for ids in topk_ids.tolist()]
        assert segments.local_ids[shard].tolist() == expected
        assert int(counts[shard]) == sum(bool(set(ids) & set(experts)) for ids in topk_ids.tolist())
        assert int(segments.header[shard, 1]) == int(counts[shard])
        assert torch.equal(segments.hidden[shard], hidden)
        assert torch.equal(segments.weights[shard], weights)


@given(routings(1), st.sampled_from([torch.float32, torch.bfloat16]))
@settings(deadline=None, max_examples=150)
def test_dispatch_then_combine_equals_a_loop_over_tokens_and_experts(routing, dtype):
    placement, topk_ids, hidden, weights = routing
    hidden = hidden.to(dtype)
    dispatcher = LocalDispatcher([FakeShard(experts) for experts in placement.shards], placement, CPU)
    dispatcher.begin_step(StepPlan(1, ((hidden.shape[0],),)))
    result = dispatcher.routed(0).dispatch(3, hidden, topk_ids, weights).wait()
    assert result.dtype is dtype
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(
        result.double(), slow_moe(3, hidden, topk_ids, weights), rtol=tolerance, atol=tolerance * 40
    )


def test_the_worked_example_of_the_layout_page():
    placement = ExpertPlacement(4, ((0, 1), (2, 3)))
    assert local_id_table(placement, CPU).tolist() == [[0, 1, -1, -1], [-1, -1, 0, 1]]
    topk_ids = torch.tensor([[0, 1], [2, 0], [3, 2]])
    segments, counts = packed(placement, topk_ids, torch.ones(3, 2), torch.ones(3, 2))
    assert segments.local_ids.tolist() == [[[0, 1], [-1, 0], [-1, -1]], [[-1, -1], [0, -1], [1, 0]]]
    assert counts.tolist() == [2, 2]


def test_segments_are_aligned_and_their_parts_do_not_overlap():
    for dtype in (torch.float32, torch.bfloat16):
        shape = RowShape(hidden_size=5, top_k=3, dtype=dtype)
        for num_tokens in range(1, 9):
            size = shape.dispatch_bytes(num_tokens)
            assert size % 16 == 0
            assert shape.combine_bytes(num_tokens) % 16 == 0
            memory = torch.zeros(size, dtype=torch.uint8)
            segment = shape.dispatch_segment(memory, num_tokens)
            parts = (segment.header, segment.hidden, segment.local_ids, segment.weights)
            for value, part in enumerate(parts, start=1):
                assert part.data_ptr() % 16 == memory.data_ptr() % 16
                part.fill_(value)
            for value, part in enumerate(parts, start=1):
                assert bool((part == value).all())


def test_a_rank_without_tokens_has_segments_of_no_bytes():
    shape = RowShape(hidden_size=5, top_k=3, dtype=torch.float32)
    assert (shape.dispatch_bytes(0), shape.combine_bytes(0)) == (0, 0)


def test_a_shard_without_a_token_gets_no_expert_and_finite_values():
    segments, counts = packed(
        contiguous_placement(4, 2), torch.tensor([[0], [0], [1]]), torch.ones(3, 2), torch.ones(3, 1)
    )
    assert counts.tolist() == [3, 0]
    assert segments.local_ids[1].tolist() == [[-1], [-1], [-1]]
    assert bool(segments.hidden.isfinite().all())


def test_segments_seen_together_are_the_segments_seen_one_by_one():
    shape = RowShape(hidden_size=5, top_k=3, dtype=torch.bfloat16)
    memory = torch.zeros(3 * shape.dispatch_bytes(4), dtype=torch.uint8)
    together = shape.dispatch_segments(memory, 4, 3)
    for part in (together.header, together.hidden, together.local_ids, together.weights):
        part.copy_(torch.arange(part.numel()).view(part.shape))
    for shard, piece in enumerate(memory.chunk(3)):
        alone = shape.dispatch_segment(piece, 4)
        assert torch.equal(alone.header, together.header[shard])
        assert torch.equal(alone.hidden, together.hidden[shard])
        assert torch.equal(alone.local_ids, together.local_ids[shard])
        assert torch.equal(alone.weights, together.weights[shard])


def test_sums_are_added_in_float32_and_are_a_tensor_of_their_own():
    returned = torch.tensor([[[256.0]], [[1.0]], [[1.0]]], dtype=torch.bfloat16)  # 257 is no bfloat16, 258 is
    assert sum_rows(returned).tolist() == [[258.0]]
    alone = torch.ones(1, 2, 3)
    total = sum_rows(alone)
    alone.fill_(7.0)
    assert total.tolist() == [[1.0] * 3] * 2


def test_the_local_dispatcher_counts_the_rows_of_each_shard():
    placement = contiguous_placement(4, 2)
    dispatcher = LocalDispatcher([FakeShard(experts) for experts in placement.shards], placement, CPU)
    dispatcher.begin_step(StepPlan(1, ((3,),)))
    for _ in range(2):
        ids = torch.tensor([[0, 1], [1, 2], [0, 3]])
        dispatcher.routed(0).dispatch(1, torch.ones(3, 2), ids, torch.ones(3, 2)).wait()
    assert dispatcher.rows_sent == (6, 4)


@pytest.mark.parametrize("fence", [HostFence(5, "E1"), DeviceFence(5, CPU, "E1")])
def test_a_fence_refuses_rows_of_another_epoch_and_names_them(fence: Fence):
    fence.admit((torch.tensor([5, 3]), torch.tensor([5, 4])))
    assert fence.settle() == 7

    def admit_a_stranger() -> None:
        fence.admit((torch.tensor([5, 3]), torch.tensor([4, 1])))
        fence.settle()  # on a device it is noticed when the step is over

    with pytest.raises(EpochAbortedError, match="rank E1 received 1 segments of another epoch than 5"):
        admit_a_stranger()


def test_on_the_host_a_stranger_is_refused_before_it_is_computed():
    with pytest.raises(EpochAbortedError):
        HostFence(5, "E1").admit((torch.tensor([4, 1]),))


def test_a_micro_batch_without_a_token_on_any_rank_has_no_experts():
    placement = contiguous_placement(4, 2)
    dispatcher = LocalDispatcher([FakeShard(experts) for experts in placement.shards], placement, CPU)
    dispatcher.begin_step(StepPlan(1, ((3, 0),)))
    assert dispatcher.routed(0) is not None
    assert dispatcher.routed(1) is None
