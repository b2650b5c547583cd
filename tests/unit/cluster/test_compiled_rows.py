"""Compiled packing and adding up against the tensor code that says what they are."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.dispatch import compiled_rows
from cluster.dispatch.compiled_rows import CompiledPack, can_sum, compiled_sum
from cluster.dispatch.layout import RowShape, local_id_table, pack_rows, sum_rows
from model_shards.placement import ExpertPlacement

CPU = torch.device("cpu")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=[1, 3])
def threads(request, monkeypatch):
    monkeypatch.setattr(compiled_rows, "_ROWS_OF_A_TEAM", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tokens=st.integers(1, 40),
    top_k=st.integers(1, 5),
    shards=st.integers(1, 4),
    hidden_size=st.integers(1, 40),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_segments_are_byte_for_byte_those_of_the_tensor_code(
    threads, tokens, top_k, shards, hidden_size, dtype, seed
) -> None:
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_parts_are_added_in_order_in_float32(dtype, count, threads) -> None:
    parts = random(count, 9, 48, seed=count).to(dtype)
    apart = torch.zeros(count, 9 * 48 + 8, dtype=dtype)
    apart[:, : 9 * 48] = parts.flatten(1)
    lying_apart = apart[:, : 9 * 48].view(count, 9, 48)
    assert can_sum(lying_apart)
    expected = torch.zeros(9, 48)
    for part in parts:
        expected += part
    summed = compiled_sum(lying_apart)
    assert torch.equal(summed, expected.to(dtype))
    assert torch.allclose(summed.float(), sum_rows(parts).float(), rtol=2**-7, atol=1e-5)


def test_segments_for_other_rows_are_refused() -> None:
    placement = ExpertPlacement(2, ((0,), (1,)))
    shape = RowShape(16, 1, torch.bfloat16)
    segments = shape.dispatch_segments(torch.zeros(2 * shape.dispatch_bytes(3), dtype=torch.uint8), 3, 2)
    pack = CompiledPack(local_id_table(placement, CPU), torch.zeros(2, dtype=torch.int64)).pack
    ids, weights = torch.zeros(3, 1, dtype=torch.int64), torch.zeros(3, 1)
    pack(torch.zeros(3, 16, dtype=torch.bfloat16), ids, weights, segments)
    with pytest.raises(AssertionError, match="another dtype"):
        pack(torch.zeros(3, 16), ids, weights, segments)
    with pytest.raises(AssertionError, match="as many rows"):
        pack(torch.zeros(4, 16, dtype=torch.bfloat16), ids, weights, segments)
    with pytest.raises(AssertionError, match="as many slots"):
        pack(torch.zeros(3, 16, dtype=torch.bfloat16), ids.repeat(1, 2), weights, segments)


def test_what_has_no_compiled_sum_is_told() -> None:
    assert not can_sum(torch.zeros(2, 3, 40))
    assert not can_sum(torch.zeros(2, 3, 16, dtype=torch.float64))
