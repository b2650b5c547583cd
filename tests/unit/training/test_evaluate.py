"""What the figures of the card are computed from."""

import pytest
import torch

from model_shards.quantization import Quantization
from training.evaluate import with_quantized_experts
from training.model import build_model, demo_config

LARGEST_STEP = {Quantization.INT8: 0.5 / 127, Quantization.FP8: 2**-4}  # of a value's row, of the value itself


@pytest.mark.parametrize("quantization", list(Quantization))
def test_quantizing_for_the_card_moves_the_routed_experts_a_little_and_nothing_else(quantization):
    config = demo_config(64, bos_token_id=0, eos_token_id=1)
    config.update({"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 32, "moe_intermediate_size": 8})
    model = build_model(config, seed=0).eval()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    quantized = with_quantized_experts(model, quantization)
    for name, parameter in quantized.named_parameters():
        moved = (parameter - before[name]).abs()
        largest = before[name].abs().amax(dim=-1, keepdim=True)
        assert bool(moved.any()) == (".mlp.experts." in name), name
        assert bool((moved <= 1.01 * LARGEST_STEP[quantization] * largest).all()), name
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
