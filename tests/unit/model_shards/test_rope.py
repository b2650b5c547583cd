"""Rotary angles against transformers' and against the definition."""

import math
from dataclasses import replace

import pytest
import torch
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2RotaryEmbedding

from model_shards.rope import RotaryEmbedding, apply_rotary, attention_scale
from tests.reference import CPU, PLAIN_ROPE, YARN_ROPE, make_hf_config, model_config_of

POSITIONS = torch.tensor([0, 1, 17, 4095, 4096, 60_000, 163_839])


@pytest.mark.parametrize(
    "rope",
    [
        PLAIN_ROPE,
        YARN_ROPE,
        {**YARN_ROPE, "mscale": 1.0, "mscale_all_dim": 0.3},
        {**YARN_ROPE, "beta_fast": 2.0, "beta_slow": 2.0},
        {**YARN_ROPE, "factor": 1.0},
    ],
)
@pytest.mark.parametrize("dim", [2, 8, 64])
def test_angles_equal_those_of_transformers(rope: dict[str, object], dim: int) -> None:
    hf_config = make_hf_config(rope_parameters=rope, qk_rope_head_dim=dim, max_position_embeddings=163840)
    expected = DeepseekV2RotaryEmbedding(hf_config)(torch.zeros(1), POSITIONS[None])[0]
    rotary = RotaryEmbedding(model_config_of(hf_config).rope, dim, CPU)(POSITIONS)
    torch.testing.assert_close(rotary, expected, rtol=1e-4, atol=1e-4)


def test_neighbouring_dimensions_turn_as_a_pair() -> None:
    x = torch.tensor([[1.0, 0.0, 0.0, 1.0]])
    angle = torch.tensor([[math.pi / 2, math.pi]])
    turned = apply_rotary(x, torch.polar(torch.ones(1, 2), angle))
    torch.testing.assert_close(turned, torch.tensor([[0.0, 1.0, 0.0, -1.0]]), rtol=0, atol=1e-6)


def test_a_part_of_a_row_with_odd_strides_turns_alike_and_stays_as_it_was() -> None:
    whole = torch.randn(3, 7, generator=torch.Generator().manual_seed(1))
    part, before = whole[:, 1:5], whole.clone()
    rotary = torch.polar(torch.ones(3, 2), torch.tensor([[0.3, 1.0], [2.0, 3.0], [4.0, 5.0]]))
    assert torch.equal(apply_rotary(part, rotary), apply_rotary(part.clone(), rotary))
    assert torch.equal(whole, before)


def test_products_depend_on_the_distance_of_positions_alone() -> None:
    config = model_config_of(make_hf_config())
    rotary = RotaryEmbedding(config.rope, 8, CPU)
    q, k = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(0))

    def product(q_position: int, k_position: int) -> torch.Tensor:
        turned_q = apply_rotary(q, rotary(torch.tensor([q_position])))
        return (turned_q * apply_rotary(k, rotary(torch.tensor([k_position])))).sum()

    torch.testing.assert_close(product(9, 4), product(105, 100), rtol=1e-4, atol=1e-4)


def test_only_one_of_the_two_mscales_follows_the_published_code() -> None:
    config = model_config_of(make_hf_config(rope_parameters=YARN_ROPE))
    assert config.rope.yarn is not None
    one_sided = replace(config.rope, yarn=replace(config.rope.yarn, mscale_all_dim=0.0))
    rotary = RotaryEmbedding(one_sided, 8, CPU)(torch.tensor([0]))
    torch.testing.assert_close(rotary.real, torch.full((1, 4), 0.1 * 0.707 * math.log(40) + 1))


def test_mscale_all_dim_sharpens_the_softmax() -> None:
    plain = model_config_of(make_hf_config())
    yarn = model_config_of(make_hf_config(rope_parameters=YARN_ROPE))
    assert attention_scale(plain) == pytest.approx(24**-0.5)
    assert attention_scale(yarn) == pytest.approx(24**-0.5 * (0.1 * 0.707 * math.log(40) + 1) ** 2)


def test_no_table_over_positions_is_held() -> None:
    rotary = RotaryEmbedding(model_config_of(make_hf_config()).rope, 64, CPU)
    assert sum(buffer.numel() for buffer in rotary.buffers()) == 32
    assert not rotary.state_dict()
