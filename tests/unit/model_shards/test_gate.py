"""The gate against the published code written as a plain loop."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model_shards.config import ModelConfig
from model_shards.gate import Gate, Routing
from tests.reference import CPU, make_hf_config, model_config_of, reference_gate

BASE = model_config_of(make_hf_config())


def gate_of(config: ModelConfig, seed: int) -> Gate:
    gate = Gate(config, CPU)
    gate.weight.copy_(torch.randn(gate.weight.shape, generator=torch.Generator().manual_seed(seed)) * 0.5)
    return gate


def by_expert(routing: Routing, num_experts: int) -> torch.Tensor:
    """Weights [T, E] with zero where an expert was not chosen: the order of a token's experts drops out."""
    dense = torch.zeros(routing.topk_ids.shape[0], num_experts)
    return dense.scatter(1, routing.topk_ids, routing.topk_weights)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_routing_equals_the_published_code(data: st.DataObject) -> None:
    groups = data.draw(st.sampled_from([1, 2, 4, 8]), "groups")
    experts = groups * data.draw(st.integers(1, 4), "experts per group")
    topk_group = data.draw(st.integers(1, groups), "topk_group")
    method = data.draw(st.sampled_from(["greedy", "group_limited_greedy"]), "method")
    reachable = experts if method == "greedy" else experts // groups * topk_group
    config = replace(
        BASE,
        n_routed_experts=experts,
        n_group=groups,
        topk_group=topk_group,
        topk_method=method,
        num_experts_per_tok=data.draw(st.integers(1, min(6, reachable)), "top_k"),
        norm_topk_prob=data.draw(st.booleans(), "norm_topk_prob"),
        routed_scaling_factor=data.draw(st.sampled_from([1.0, 2.5, 16.0]), "scale"),
    )
    seed = data.draw(st.integers(0, 1000), "seed")
    tokens = data.draw(st.integers(0, 6), "tokens")
    hidden = torch.randn((tokens, config.hidden_size), generator=torch.Generator().manual_seed(seed))
    gate = gate_of(config, seed + 1)

    routing = gate(hidden)

    assert routing.topk_ids.shape == (tokens, config.num_experts_per_tok)
    assert (routing.topk_ids.dtype, routing.topk_weights.dtype) == (torch.int64, torch.float32)
    expected = reference_gate(config, hidden, gate.weight)
    torch.testing.assert_close(by_expert(routing, experts), by_expert(expected, experts), rtol=1e-4, atol=1e-6)


def test_normalised_weights_sum_to_one_and_are_not_scaled() -> None:
    config = replace(BASE, norm_topk_prob=True, routed_scaling_factor=16.0)
    routing = gate_of(config, 0)(torch.randn(5, config.hidden_size, generator=torch.Generator().manual_seed(1)))
    torch.testing.assert_close(routing.topk_weights.sum(-1), torch.ones(5))


def test_a_single_expert_per_token_is_scaled_and_not_normalised() -> None:
    config = replace(BASE, norm_topk_prob=True, routed_scaling_factor=16.0, num_experts_per_tok=1)
    gate = gate_of(config, 0)
    hidden = torch.randn(5, config.hidden_size, generator=torch.Generator().manual_seed(1))
    best = (hidden @ gate.weight.T).softmax(-1).amax(-1)
    torch.testing.assert_close(gate(hidden).topk_weights[:, 0], best * 16.0)


def test_underflowed_scores_never_lead_outside_the_chosen_groups() -> None:
    config = replace(BASE, topk_method="group_limited_greedy", n_group=4, topk_group=2, num_experts_per_tok=4)
    gate = Gate(config, CPU)
    # Groups of two experts. 7 leads and 2 is far behind; all others underflow to exactly zero in float32, so the
    # partners 6 and 3 must win over experts of dropped groups with the same score.
    logits = torch.tensor([-1e3, -1e3, -50.0, -1e3, -1e3, -1e3, -1e3, 0.0])
    gate.weight.copy_((logits / config.hidden_size)[:, None].expand_as(gate.weight))
    routing = gate(torch.ones(1, config.hidden_size))
    assert sorted(routing.topk_ids[0].tolist()) == [2, 3, 6, 7]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_are_computed_in_float32_whatever_the_hidden_dtype(dtype: torch.dtype) -> None:
    gate = gate_of(BASE, 0)
    hidden = torch.randn(4, BASE.hidden_size, generator=torch.Generator().manual_seed(2)).to(dtype)
    assert torch.equal(gate(hidden).topk_weights, gate(hidden.float()).topk_weights)
    assert gate.weight.dtype == torch.float32
