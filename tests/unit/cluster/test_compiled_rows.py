"""Compiled packing and adding up against the tensor code that says what they are."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.dispatch import compiled_rows
from cluster.dispatch.compiled_rows import CompiledPack, CompiledSum, can_sum
from cluster.dispatch.layout import RowShape, local_id_table, pack_rows, sum_rows
from model_shards.placement import ExpertPlacement

CPU = torch.device("cpu")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=50, deadline=None)
@given(
    tokens=st.integers(1, 40),
    top_k=st.integers(1, 5),
    shards=st.integers(1, 4),
    hidden_size=st.integers(1, 40),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_segments_are_byte_for_byte_those_of_the_tensor_code(tokens, top_k, shards, hidden_size, dtype, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    experts = torch.randperm(12, generator=generator).tolist()
    placement = ExpertPlacement(12, tuple(tuple(sorted(experts[shard::shards])) for shard in range(shards)))
    table = local_id_table(placement, CPU)
    hidden = random(tokens, hidden_size, seed=seed).to(dtype)
    ids = torch.stack([torch.randperm(12, generator=generator)[:top_k] for _ in range(tokens)])
    weights = torch.rand(tokens, top_k, generator=generator)
    shape = RowShape(hidden_size, top_k, dtype)
    sent = torch.full((shards,), 5, dtype=torch.int64)
    lanes = [torch.full((shards * shape.dispatch_bytes(tokens),), 7, dtype=torch.uint8) for _ in range(2)]
    expected, packed = (shape.dispatch_segments(lane, tokens, shards) for lane in lanes)
    counts = pack_rows(table, hidden, ids, weights, expected)
    CompiledPack(table, sent).pack(hidden, ids, weights, packed)
    assert torch.equal(lanes[1], lanes[0])
    assert torch.equal(sent, counts + 5)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_are_bit_for_bit_those_of_the_tensor_code(dtype, threads, monkeypatch) -> None:
    monkeypatch.setattr(compiled_rows, "_ROWS_OF_A_TEAM", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for count in (1, 2, 5):
            parts = random(count, 9, 48, seed=count).to(dtype)
            apart = torch.zeros(count, 9 * 48 + 8, dtype=dtype)
            apart[:, : 9 * 48] = parts.flatten(1)
            lying_apart = apart[:, : 9 * 48].view(count, 9, 48)
            assert can_sum(lying_apart)
            summed = CompiledSum().sum(lying_apart)
            assert summed.dtype is dtype
            # Two float32 are added in one way only; of more the tensor code chooses its own order.
            if count <= 2 or dtype is torch.bfloat16:
                assert torch.allclose(summed.float(), sum_rows(parts).float(), rtol=2**-8 if count > 2 else 0, atol=0)
            else:
                assert torch.allclose(summed, sum_rows(parts), rtol=1e-6, atol=1e-6)
    finally:
        torch.set_num_threads(before)


def test_what_has_no_compiled_sum_is_told() -> None:
    assert not can_sum(torch.zeros(2, 3, 40))
    assert not can_sum(torch.zeros(2, 3, 16, dtype=torch.float64))
