"""The grouped feed-forward of a shard against one expert and one row at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model_shards.experts import ExpertShardModel
from tests.reference import (
    CPU,
    expert_shard_of,
    make_hf_config,
    model_config_of,
    published_state_dict,
    random_hf_model,
    reference_expert,
    relative_error,
)

MODEL = random_hf_model(make_hf_config(hidden_size=16, moe_intermediate_size=8, num_attention_heads=2), seed=0)
WEIGHTS = published_state_dict(MODEL)
HELD = (6, 1, 3)  # neither sorted nor contiguous
SHARD = expert_shard_of(MODEL, HELD)
LAYER = 2


def reference_sum(hidden: torch.Tensor, local_ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    total = torch.zeros_like(hidden)
    for row in range(hidden.shape[0]):
        for slot, local in enumerate(local_ids[row].tolist()):
            if local >= 0:
                total[row] += weights[row, slot] * reference_expert(WEIGHTS, LAYER, HELD[local], hidden[row])
    return total


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 12),
    top_k=st.integers(1, 6),
    choices=st.sampled_from([(-1,), (0,), (2,), (-1, 1), (0, 1, 2), (-1, 0, 1, 2)]),
    seed=st.integers(0, 1000),
)
def test_any_routing_equals_the_plain_loop(rows: int, top_k: int, choices: tuple[int, ...], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn((rows, 16), generator=generator)
    local_ids = torch.tensor(choices)[torch.randint(len(choices), (rows, top_k), generator=generator)]
    weights = torch.rand((rows, top_k), generator=generator)
    output = SHARD(LAYER, hidden, local_ids, weights)
    torch.testing.assert_close(output, reference_sum(hidden, local_ids, weights), rtol=1e-4, atol=1e-5)


def test_weights_of_empty_slots_are_ignored_even_when_not_numbers() -> None:
    hidden = torch.randn((2, 16), generator=torch.Generator().manual_seed(0))
    local_ids = torch.tensor([[0, -1], [-1, -1]])
    weights = torch.tensor([[0.5, float("nan")], [float("inf"), float("nan")]])
    output = SHARD(LAYER, hidden, local_ids, weights)
    assert torch.equal(output[1], torch.zeros(16))
    torch.testing.assert_close(output[0], 0.5 * reference_expert(WEIGHTS, LAYER, HELD[0], hidden[0]))


def test_bfloat16_sums_are_accumulated_in_float32_and_returned_in_bfloat16() -> None:
    shard = expert_shard_of(MODEL, HELD, torch.bfloat16)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn((7, 16), generator=generator)
    local_ids = torch.randint(-1, 3, (7, 4), generator=generator)
    weights = torch.rand((7, 4), generator=generator)
    output = shard(LAYER, hidden.bfloat16(), local_ids, weights)
    assert output.dtype == torch.bfloat16
    assert relative_error(output, reference_sum(hidden.bfloat16().float(), local_ids, weights)) < 0.02


def test_equal_input_gives_equal_output() -> None:
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn((50, 16), generator=generator)
    local_ids = torch.randint(-1, 3, (50, 6), generator=generator)
    weights = torch.rand((50, 6), generator=generator)
    assert torch.equal(SHARD(1, hidden, local_ids, weights), SHARD(1, hidden, local_ids, weights))


def test_slices_cover_every_parameter_once_under_published_names() -> None:
    names = [name for name, _ in SHARD.hf_slices()]
    assert len(names) == len(set(names)) == 2 * len(HELD) * 3  # layers 1 and 2
    assert set(names) <= set(WEIGHTS)
    total = sum(tensor.numel() for _, tensor in SHARD.hf_slices())
    assert total == sum(parameter.numel() for parameter in SHARD.parameters())


def test_a_slice_is_a_writable_view_of_the_shard() -> None:
    shard = ExpertShardModel(model_config_of(MODEL.config), (4,), torch.float32, CPU)
    for _, target in shard.hf_slices():
        target.fill_(3.0)
    assert all(bool((parameter == 3.0).all()) for parameter in shard.parameters())


def test_a_layer_without_routed_experts_is_refused() -> None:
    with pytest.raises(KeyError):
        SHARD(0, torch.zeros(1, 16), torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1))
