"""All ranks conclude the same from the same headers."""

import pytest

from cluster.prefill_budget import Elsewhere
from cluster.shm.outbox import ROW
from cluster.step_header import StepHeader, agree
from cluster.topology import Topology
from model_shards.errors import EpochAbortedError

TOPOLOGY = Topology(2, 1)
IDLE = [4, 0, 0, -1, -1, 0, 0, 0]


def test_the_plan_holds_the_token_counts_of_every_attention_rank_and_micro_batch():
    agreed = agree([[4, 0, 4, -1, -1, 3, 2, 0], [4, 0, 0, -1, -1, 0, 1, 0], IDLE], 4, TOPOLOGY, 2)
    assert agreed.plan.tokens == ((3, 2), (0, 1))
    assert not agreed.idle
    assert not agreed.ends


def test_a_cell_without_tokens_is_idle():
    assert agree([IDLE] * 3, 4, TOPOLOGY, 2).idle


def test_one_rank_that_wants_to_leave_ends_the_epoch_for_all():
    assert agree([[4, 0, 3, -1, -1, 3, 0, 0], IDLE, [4, 1, 0, -1, -1, 0, 0, 0]], 4, TOPOLOGY, 1).ends


def test_a_header_of_another_epoch_is_fenced_off_and_names_the_rank():
    with pytest.raises(EpochAbortedError, match="rank E0 sent a step header of epoch 3 into epoch 4"):
        agree([[4, 0, 1, -1, -1, 1, 0, 0], IDLE, [3, 0, 0, -1, -1, 0, 0, 0]], 4, TOPOLOGY, 1)


def test_each_rank_learns_of_the_others_prefills_and_of_what_their_decodes_bear():
    rows = [[4, 2, 7, -1, -1, 7, 0, 0], [4, 0, 0, 20, -1, 3, 0, 0], [4, 3, 0, 0, -1, 6, 0, 0], IDLE]
    agreed = agree(rows, 4, Topology(3, 1), 1)
    assert agreed.elsewhere(0) == Elsewhere(0, 0, 1)
    assert agreed.elsewhere(1) == Elsewhere(0, 7, 2)
    assert agreed.elsewhere(2) == Elsewhere(20, 7, 1)


def test_the_slowest_expert_rank_says_what_the_experts_took_in_the_step_before():
    def experts_s(*told: float | None) -> float | None:
        headers = [StepHeader(4, (1,), False), *(StepHeader(4, (0,), False, computed_s=seconds) for seconds in told)]
        return agree([header.row() for header in headers], 4, Topology(1, len(told)), 1).experts_s

    assert experts_s(0.0123, 0.0125) == 0.0125
    assert experts_s(0.0) == 0.0
    # A rank that took part in no step since, or whose clock does not see it, tells nothing, and then nothing is known.
    assert experts_s(0.0123, None) is None
    assert experts_s(None) is None


def test_a_header_goes_through_shared_memory_as_one_row():
    assert len(StepHeader(4, (1, 2, 3), False, computed_s=1.0).row()) < ROW
