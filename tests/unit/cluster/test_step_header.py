"""All ranks conclude the same from the same headers."""

import pytest

from cluster.prefill_budget import Elsewhere
from cluster.step_header import agree
from cluster.topology import Topology
from model_shards.errors import EpochAbortedError

TOPOLOGY = Topology(2, 1)
IDLE = [4, 0, 0, -1, 0, 0, 0]


def test_the_plan_holds_the_token_counts_of_every_attention_rank_and_micro_batch():
    agreed = agree([[4, 0, 4, -1, 3, 2, 0], [4, 0, 0, -1, 0, 1, 0], IDLE], 4, TOPOLOGY, 2)
    assert agreed.plan.tokens == ((3, 2), (0, 1))
    assert not agreed.idle
    assert not agreed.ends


def test_a_cell_without_tokens_is_idle():
    assert agree([IDLE] * 3, 4, TOPOLOGY, 2).idle


def test_one_rank_that_wants_to_leave_ends_the_epoch_for_all():
    assert agree([[4, 0, 3, -1, 3, 0, 0], IDLE, [4, 1, 0, -1, 0, 0, 0]], 4, TOPOLOGY, 1).ends


def test_a_header_of_another_epoch_is_fenced_off_and_names_the_rank():
    with pytest.raises(EpochAbortedError, match="rank E0 sent a step header of epoch 3 into epoch 4"):
        agree([[4, 0, 1, -1, 1, 0, 0], IDLE, [3, 0, 0, -1, 0, 0, 0]], 4, TOPOLOGY, 1)


def test_each_rank_learns_of_the_others_prefills_and_of_what_their_decodes_bear():
    rows = [[4, 2, 7, -1, 7, 0, 0], [4, 0, 0, 20, 3, 0, 0], [4, 3, 0, 0, 6, 0, 0], IDLE]
    agreed = agree(rows, 4, Topology(3, 1), 1)
    assert agreed.elsewhere(0) == Elsewhere(0, 0, 1)
    assert agreed.elsewhere(1) == Elsewhere(0, 7, 2)
    assert agreed.elsewhere(2) == Elsewhere(20, 7, 1)
