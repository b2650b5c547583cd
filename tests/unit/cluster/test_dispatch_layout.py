"""Rows, segments and sums, against plain loops over tokens and experts.

Shapes: T tokens, N shards, K experts per token, E experts, H hidden size.
"""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.dispatch.base import StepPlan
from cluster.dispatch.expert import Fence
from cluster.dispatch.layout import RowShape, pack_rows, plan_rows, sum_rows
from cluster.dispatch.local import LocalDispatcher
from model_shards.errors import EpochAbortedError
from model_shards.placement import ExpertPlacement, contiguous_placement
from tests.dispatch_cell import FakeShard, slow_moe

CPU = torch.device("cpu")


def tables(placement: ExpertPlacement) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(placement.shard_of()), torch.tensor(placement.local_of())


@st.composite
def routings(draw):
    """A placement and a routing; skewed ones included: all tokens to few experts, shards without a token."""
    num_experts = draw(st.integers(1, 12))
    order = draw(st.permutations(range(num_experts)))
    cuts = sorted(draw(st.sets(st.integers(1, num_experts - 1), max_size=5))) if num_experts > 1 else []
    bounds = [0, *cuts, num_experts]
    placement = ExpertPlacement(num_experts, tuple(tuple(order[a:b]) for a, b in itertools.pairwise(bounds)))
    top_k = draw(st.integers(1, min(4, num_experts)))
    allowed = draw(st.lists(st.integers(0, num_experts - 1), min_size=top_k, max_size=num_experts, unique=True))
    rows = st.permutations(allowed).map(lambda ids: ids[:top_k])
    ids = draw(st.lists(rows, max_size=9))
    topk_ids = torch.tensor(ids, dtype=torch.int64).reshape(len(ids), top_k)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    hidden = torch.randn(len(ids), draw(st.integers(1, 7)), generator=generator)
    weights = torch.rand(len(ids), top_k, generator=generator)
    return placement, topk_ids, hidden, weights


@given(routings())
@settings(deadline=None, max_examples=150)
def test_each_token_goes_once_to_each_shard_that_holds_one_of_its_experts(routing):
    placement, topk_ids, _, _ = routing
    plan = plan_rows(topk_ids, *tables(placement), placement.num_shards)
    num_tokens = topk_ids.shape[0]
    for shard, experts in enumerate(placement.shards):
        wanted = [t for t, ids in enumerate(topk_ids.tolist()) if set(ids) & set(experts)]
        assert plan.rows[shard].tolist() == wanted + [num_tokens] * (num_tokens - len(wanted))
        assert int(plan.counts[shard]) == len(wanted)
        for row, token in enumerate(plan.rows[shard].tolist()):
            ids = topk_ids[token].tolist() if token < num_tokens else []
            expected = [experts.index(e) if e in experts else -1 for e in ids] or [-1] * topk_ids.shape[1]
            assert plan.local_ids[shard, row].tolist() == expected


@given(routings(), st.sampled_from([torch.float32, torch.bfloat16]))
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
    plan = plan_rows(torch.tensor([[0, 1], [2, 0], [3, 2]]), *tables(placement), 2)
    assert plan.rows.tolist() == [[0, 1, 3], [1, 2, 3]]
    assert plan.counts.tolist() == [2, 2]
    assert plan.local_ids.tolist() == [[[0, 1], [-1, 0], [-1, -1]], [[0, -1], [1, 0], [-1, -1]]]


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


def test_unused_rows_carry_no_expert_and_finite_values():
    placement = contiguous_placement(4, 2)
    shape = RowShape(hidden_size=2, top_k=1, dtype=torch.float32)
    memory = torch.full((2, shape.dispatch_bytes(3)), 255, dtype=torch.uint8)  # every float in it is NaN
    segments = tuple(shape.dispatch_segment(memory[shard], 3) for shard in range(2))
    plan = plan_rows(torch.tensor([[0], [0], [1]]), *tables(placement), 2)
    pack_rows(plan, 7, torch.ones(3, 2), torch.ones(3, 1), segments)
    assert [segment.header.tolist() for segment in segments] == [[7, 3], [7, 0]]
    assert segments[1].local_ids.tolist() == [[-1], [-1], [-1]]
    assert all(bool(segment.hidden.isfinite().all()) for segment in segments)


def test_what_comes_back_for_unused_rows_is_not_added():
    plan = plan_rows(torch.tensor([[0], [1]]), torch.tensor([0, 1]), torch.tensor([0, 0]), 2)
    nan = float("nan")
    first, second = torch.tensor([[1.0], [nan]]), torch.tensor([[5.0], [nan]])
    assert sum_rows(plan, (first, second)).tolist() == [[1.0], [5.0]]


def test_the_local_dispatcher_counts_the_rows_of_each_shard():
    placement = contiguous_placement(4, 2)
    dispatcher = LocalDispatcher([FakeShard(experts) for experts in placement.shards], placement, CPU)
    dispatcher.begin_step(StepPlan(1, ((3,),)))
    for _ in range(2):
        ids = torch.tensor([[0, 1], [1, 2], [0, 3]])
        dispatcher.routed(0).dispatch(1, torch.ones(3, 2), ids, torch.ones(3, 2)).wait()
    assert dispatcher.rows_sent == (6, 4)


def test_a_fence_refuses_rows_of_another_epoch_and_names_them():
    fence = Fence(5, CPU, "E1")
    fence.admit(torch.tensor([[5, 3], [5, 4]]))
    assert fence.settle() == 7
    with pytest.raises(EpochAbortedError, match="rank E1 received 1 segments of another epoch than 5"):
        fence.admit(torch.tensor([[5, 3], [4, 1]]))
