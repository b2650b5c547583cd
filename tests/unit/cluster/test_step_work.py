"""What a step's work is, by hand."""

from dataclasses import replace

import pytest

from cluster.request import GenerationRequest
from cluster.scheduler import ScheduledChunk
from cluster.sequence import Sequence
from cluster.step_work import context_worth_a_token, mean_context, work_of
from tests.fakes import fake_config

SEQUENCE = Sequence(GenerationRequest("a", (1,), 1))


def chunk(start: int, stop: int, is_decode: bool = False) -> ScheduledChunk:
    return ScheduledChunk(SEQUENCE, start, stop, is_decode, wants_logits=False)


def test_a_token_attends_to_all_before_it_and_itself() -> None:
    # 1 + 2 + 3 + 4, then 11 + 12, and the decode counts as one token.
    chunks = (chunk(500, 501, is_decode=True), chunk(0, 4), chunk(10, 12))
    assert mean_context(chunks) == (10 + 23) // 6
    assert work_of(chunks, 10.0) == pytest.approx(7 + 3.3)
    assert mean_context(chunks[:1]) == 0
    assert work_of(chunks[:1], 10.0) == 1.0


def test_the_context_worth_a_token_is_that_of_as_many_multiplications() -> None:
    config = replace(
        fake_config(),
        hidden_size=10,
        num_hidden_layers=3,
        first_k_dense_replace=1,
        intermediate_size=7,
        moe_intermediate_size=5,
        num_experts_per_tok=2,
        n_shared_experts=1,
        num_attention_heads=2,
        kv_lora_rank=4,
        qk_nope_head_dim=3,
        qk_rope_head_dim=2,
        v_head_dim=6,
    )
    layer = 10 * 2 * (3 + 2) + 10 * (4 + 2) + 2 * 6 * 10
    mlps = 3 * 10 * 7 + 2 * (3 * 10 * 5) * (2 + 1)
    attending = 3 * 2 * (3 + 2 + 6)
    assert context_worth_a_token(config) == pytest.approx((3 * layer + mlps) / attending)
    with_queries = replace(config, q_lora_rank=8)
    more = 3 * (10 * 8 + 8 * 2 * (3 + 2) - 10 * 2 * (3 + 2))
    assert context_worth_a_token(with_queries) == pytest.approx((3 * layer + mlps + more) / attending)
