"""The balance losses against loops written from the report's equations 23 to 31, and what their gradients do."""

import pytest
import torch
from transformers import DeepseekV2ForCausalLM

from training.balance import (
    BalanceFactors,
    BalanceLosses,
    DeviceLayout,
    RouterProbe,
    RouterRecord,
    balance_losses,
    expert_counts,
    sum_over_layers,
)
from training.model import build_model, demo_config

LAYOUT = DeviceLayout(num_devices=3, max_devices_per_token=2)
FACTORS = BalanceFactors(expert=0.003, device=0.05, communication=0.02)
EXPERTS, CHOSEN = 6, 2


def random_routing(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores [3, 7, 6], distinct chosen experts [3, 7, 2], and a mask whose sequences have 7, 4 and 0 tokens."""
    generator = torch.Generator().manual_seed(seed)
    scores = (2 * torch.randn(3, 7, EXPERTS, generator=generator)).softmax(-1)
    ids = torch.rand(3, 7, EXPERTS, generator=generator).topk(CHOSEN).indices
    mask = torch.arange(7) < torch.tensor([[7], [4], [0]])
    return scores, ids, mask


def slow_losses(scores: list[list[float]], ids: list[list[int]]) -> tuple[float, float, float]:
    """Equations 23 to 31 for one sequence without padding."""
    length, per_device = len(scores), EXPERTS // LAYOUT.num_devices
    devices = [range(d * per_device, (d + 1) * per_device) for d in range(LAYOUT.num_devices)]
    f = [EXPERTS / (CHOSEN * length) * sum(i in chosen for chosen in ids) for i in range(EXPERTS)]
    p = [sum(token[i] for token in scores) / length for i in range(EXPERTS)]
    p_device = [sum(p[j] for j in device) for device in devices]
    f_device = [sum(f[j] for j in device) / len(device) for device in devices]
    f_sent = [
        LAYOUT.num_devices
        / (LAYOUT.max_devices_per_token * length)
        * sum(any(expert in device for expert in chosen) for chosen in ids)
        for device in devices
    ]
    return (
        FACTORS.expert * sum(a * b for a, b in zip(f, p, strict=True)),
        FACTORS.device * sum(a * b for a, b in zip(f_device, p_device, strict=True)),
        FACTORS.communication * sum(a * b for a, b in zip(f_sent, p_device, strict=True)),
    )


def floats(losses: BalanceLosses) -> tuple[float, float, float]:
    return losses.expert.item(), losses.device.item(), losses.communication.item()


@pytest.mark.parametrize("seed", range(3))
def test_the_losses_are_the_equations_averaged_over_sequences_without_their_padding(seed):
    scores, ids, mask = random_routing(seed)
    slow = [slow_losses(scores[row, :length].tolist(), ids[row, :length].tolist()) for row, length in ((0, 7), (1, 4))]
    expected = [sum(values) / 2 for values in zip(*slow, strict=True)]
    assert floats(balance_losses(scores, ids, mask, LAYOUT, FACTORS)) == pytest.approx(expected, rel=1e-5)


def test_padding_changes_nothing():
    scores, ids, mask = random_routing(0)
    before = floats(balance_losses(scores, ids, mask, LAYOUT, FACTORS))
    ids[~mask] = 0
    scores[~mask] = 1.0
    assert floats(balance_losses(scores, ids, mask, LAYOUT, FACTORS)) == before


def test_a_router_in_perfect_balance_makes_each_loss_its_factor():
    scores = torch.full((1, 3, EXPERTS), 1 / EXPERTS)
    ids = torch.tensor([[[0, 2], [1, 4], [3, 5]]])  # each expert once, each device twice
    losses = balance_losses(scores, ids, torch.ones(1, 3, dtype=torch.bool), LAYOUT, FACTORS)
    assert floats(losses) == pytest.approx((FACTORS.expert, FACTORS.device, FACTORS.communication))


def test_all_tokens_on_one_device_cost_as_many_times_more_as_there_are_devices():
    scores = torch.tensor([0.5, 0.5, 0, 0, 0, 0]).expand(1, 3, EXPERTS)
    ids = torch.tensor([0, 1]).expand(1, 3, CHOSEN)
    losses = balance_losses(scores, ids, torch.ones(1, 3, dtype=torch.bool), LAYOUT, FACTORS)
    # A token goes to one of the two devices it may go to: communication is half of three times its factor.
    assert floats(losses) == pytest.approx((3 * FACTORS.expert, 3 * FACTORS.device, 1.5 * FACTORS.communication))


@pytest.mark.parametrize("name", ["expert", "device", "communication"])
def test_following_the_gradient_of_any_one_loss_evens_the_load(name):
    hidden = torch.randn(4, 32, 8, generator=torch.Generator().manual_seed(0)) + 1.0  # a common part: few experts win
    mask = torch.ones(4, 32, dtype=torch.bool)
    weight = torch.randn(EXPERTS, 8, generator=torch.Generator().manual_seed(2)).requires_grad_()
    unevenness: list[float] = []
    for _ in range(300):
        scores = (hidden @ weight.T).softmax(-1)
        ids = scores.topk(CHOSEN).indices
        load = torch.bincount(ids.flatten(), minlength=EXPERTS).float()
        counted = load if name == "expert" else load.view(LAYOUT.num_devices, -1).sum(1)
        unevenness.append((counted.std() / counted.mean()).item())
        loss = getattr(balance_losses(scores, ids, mask, LAYOUT, BalanceFactors(1.0, 1.0, 1.0)), name)
        (gradient,) = torch.autograd.grad(loss, weight)
        weight = (weight - 0.1 * gradient).detach().requires_grad_()
    assert unevenness[-1] < 0.2 * unevenness[0]


def test_losses_of_several_layers_add_up_and_none_is_zero():
    scores, ids, mask = random_routing(0)
    one = floats(balance_losses(scores, ids, mask, LAYOUT, FACTORS))
    two = floats(sum_over_layers([RouterRecord(scores, ids)] * 2, mask, LAYOUT, FACTORS))
    assert two == pytest.approx([2 * value for value in one])
    assert floats(sum_over_layers([], mask, LAYOUT, FACTORS)) == (0.0, 0.0, 0.0)


def test_expert_counts_leave_padding_out():
    scores, ids, mask = random_routing(0)
    counts = expert_counts(RouterRecord(scores, ids), mask)
    assert counts.sum() == (7 + 4) * CHOSEN
    assert counts[3] == (ids[0, :7] == 3).sum() + (ids[1, :4] == 3).sum()


@pytest.fixture(scope="module")
def model() -> DeepseekV2ForCausalLM:
    config = demo_config(32, bos_token_id=0, eos_token_id=1)
    config.update({"hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 32, "moe_intermediate_size": 8})
    return build_model(config, seed=0)


def test_a_probe_collects_each_moe_layer_in_order_and_its_scores_lead_back_to_that_gate(model):
    with RouterProbe(model) as probe:
        model.model(input_ids=torch.tensor([[5, 6, 7], [8, 9, 10]]), use_cache=False)
        records = probe.take()
        assert probe.take() == []
    assert [record.scores.shape for record in records] == [(2, 3, 16)] * 2
    assert [record.topk_ids.shape for record in records] == [(2, 3, 4)] * 2
    records[0].scores.square().sum().backward()
    assert model.model.layers[1].mlp.gate.weight.grad.abs().sum() > 0
    assert model.model.layers[2].mlp.gate.weight.grad is None


def test_the_best_experts_of_the_probes_scores_are_among_the_chosen(model):
    with RouterProbe(model) as probe:
        model.model(input_ids=torch.tensor([[5, 6, 7], [8, 9, 10]]), use_cache=False)
        for record in probe.take():
            best = record.scores.argmax(-1, keepdim=True)
            assert (record.topk_ids == best).any(-1).all()


def test_a_probe_that_is_left_collects_no_more(model):
    with RouterProbe(model) as probe:
        pass
    model.model(input_ids=torch.tensor([[5]]), use_cache=False)
    assert probe.take() == []
