"""Compiled routing against `Gate.forward`, which says what it is."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model_shards.gate import Gate, Routing
from model_shards.kernels.program import Call, Program
from model_shards.kernels.routing import CHOICE_ARGUMENTS, SCORES_ARGUMENTS, Choice, choose_experts, gate_scores
from tests.reference import CPU, make_hf_config, model_config_of

HIDDEN = 64

pytestmark = pytest.mark.usefixtures("built_for")


def gate(**overrides: object) -> Gate:
    shape = {"hidden_size": HIDDEN, "n_routed_experts": 32, "num_experts_per_tok": 4}
    made = Gate(model_config_of(make_hf_config(**{**shape, **overrides})), CPU)
    made.weight.data.copy_(torch.randn(made.weight.shape, generator=torch.Generator().manual_seed(1)) / 2)
    return made


def compiled(gate: Gate, hidden: torch.Tensor, threads: int = 1) -> Routing:
    rows = torch.tensor([hidden.shape[0]])
    experts = gate.weight.shape[0]
    groups = gate.num_groups
    choice = Choice(experts, groups, gate.topk_group, gate.top_k, gate.normalise, gate.routed_scaling_factor)
    scores = torch.empty(hidden.shape[0], experts)
    ids = torch.empty(hidden.shape[0], gate.top_k, dtype=torch.int64)
    weights = torch.empty(hidden.shape[0], gate.top_k)
    score = Call(
        gate_scores(),
        SCORES_ARGUMENTS,
        rows=rows.data_ptr(),
        x=hidden.data_ptr(),
        weight=gate.weight.data_ptr(),
        out=scores.data_ptr(),
        size=HIDDEN,
        experts=experts,
    )
    choose = Call(
        choose_experts(choice),
        CHOICE_ARGUMENTS,
        rows=rows.data_ptr(),
        scores=scores.data_ptr(),
        ids=ids.data_ptr(),
        weights=weights.data_ptr(),
    )
    Program([score, choose]).run(threads)
    return Routing(ids, weights)


def by_expert(routing: Routing, experts: int) -> torch.Tensor:
    """[T, E]: weights at their experts, whatever their order."""
    empty = torch.full((routing.topk_ids.shape[0], experts), -1.0)
    return empty.scatter(1, routing.topk_ids, routing.topk_weights)


GATES = {
    "plain": gate(),
    "scaled": gate(routed_scaling_factor=2.5),
    "normalised": gate(norm_topk_prob=True),
    "groups": gate(topk_method="group_limited_greedy", n_group=8, topk_group=3),
    "normalised groups": gate(topk_method="group_limited_greedy", n_group=4, topk_group=2, norm_topk_prob=True),
    "the most experts of all": gate(n_routed_experts=16, num_experts_per_tok=16),
}


@pytest.mark.parametrize("name", GATES)
@settings(max_examples=20, deadline=None)
@given(tokens=st.integers(1, 70), seed=st.integers(0, 1000), threads=st.sampled_from([1, 3]))
def test_it_chooses_and_weighs_as_the_gate_does(name: str, tokens: int, seed: int, threads: int) -> None:
    hidden = torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(seed)).bfloat16()
    experts = GATES[name].weight.shape[0]
    chosen = by_expert(compiled(GATES[name], hidden, threads), experts)
    expected = by_expert(GATES[name](hidden), experts)
    assert torch.allclose(chosen, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", GATES)
def test_a_row_that_is_not_finite_names_as_many_experts_and_no_weight_for_them(name: str) -> None:
    hidden = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(5)).bfloat16()
    hidden[1, 7] = float("nan")
    routing = compiled(GATES[name], hidden)
    top_k, experts = GATES[name].top_k, GATES[name].weight.shape[0]
    assert len(set(routing.topk_ids[1].tolist())) == top_k
    assert all(0 <= expert < experts for expert in routing.topk_ids.flatten().tolist())
    assert bool(routing.topk_weights[1].isnan().any())
    clean = compiled(GATES[name], hidden[[0, 2]].contiguous())
    assert torch.equal(routing.topk_ids[[0, 2]], clean.topk_ids)
    assert torch.equal(routing.topk_weights[[0, 2]], clean.topk_weights)
