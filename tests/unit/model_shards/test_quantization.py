"""Quantized matrices: how far they are from the originals, and the products computed with them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model_shards.expert_matrix import ExpertMatrix, make_expert_matrix
from model_shards.experts import ExpertShardModel
from model_shards.quantization import Quantization, quantize_matrices, quantize_rows
from tests.reference import CPU, make_hf_config, model_config_of, reference_expert, relative_error

BOTH = pytest.mark.parametrize("quantization", list(Quantization))


def matrix(rows: int, columns: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn((rows, columns), generator=torch.Generator().manual_seed(seed))


@BOTH
@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 9), columns=st.integers(1, 40), seed=st.integers(0, 999), exponent=st.integers(-30, 30))
def test_every_value_is_the_nearest_of_its_row(
    quantization: Quantization, rows: int, columns: int, seed: int, exponent: int
) -> None:
    weight = matrix(rows, columns, seed, 2.0**exponent)
    quantized = quantize_rows(weight, quantization)
    scale = quantized.scale_inv[:, None].double()
    assert torch.equal(quantized.scale_inv, weight.abs().amax(1) / quantization.largest)
    error = (quantized.values.double() * scale - weight.double()).abs()
    if quantization is Quantization.INT8:
        step = scale.expand_as(error)
    else:  # 3 bits of mantissa; below 2**-6 a fixed step
        step = 2.0 ** ((weight.double() / scale).abs().clamp_min(2.0**-6).log2().floor() - 3) * scale
    assert bool((error <= 0.5 * step * (1 + 1e-5)).all())
    # A row depends on no other, so a matrix may be quantized in blocks.
    one = quantize_rows(weight[:1], quantization)
    assert torch.equal(one.values.float(), quantized.values[:1].float())


@BOTH
def test_zeros_stay_zero_and_the_largest_of_a_row_is_the_largest_value(quantization: Quantization) -> None:
    weight = torch.tensor([[0.0, 0.0, 0.0], [1e-42, 0.0, -1e-42], [3.0, -6.0, 0.0]])
    kept = weight.clone()
    quantized = quantize_rows(weight, quantization)
    assert torch.equal(weight, kept)
    assert bool(quantized.scale_inv.isfinite().all())
    assert quantized.values.float()[0].tolist() == [0.0, 0.0, 0.0]
    assert quantized.values.float()[2, 1] == -quantization.largest


@BOTH
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_refused(quantization: Quantization, value: float) -> None:
    weight = torch.ones(3, 4, dtype=torch.bfloat16)
    weight[1, 2] = value
    with pytest.raises(ValueError, match="not finite"):
        quantize_rows(weight, quantization)
    with pytest.raises(ValueError, match="not finite"):
        quantize_rows(torch.full((1, 2), 1e300, dtype=torch.float64), quantization)


def filled(quantization: Quantization, dtype: torch.dtype, outer: int, inner: int, num_experts: int) -> ExpertMatrix:
    """Matrix e is that of seed e."""
    matrices = make_expert_matrix(num_experts, inner, outer, dtype, CPU, quantization)
    for expert in range(num_experts):
        quantized = quantize_rows(matrix(outer, inner, expert), quantization)
        stored = dict(matrices.stored())
        stored[""][expert].copy_(quantized.values)
        stored["_scale_inv"][expert].copy_(quantized.scale_inv)
    return matrices


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 64, 32), (3, 33, 17), (16, 192, 128), (70, 5, 3)])
def test_products_are_those_of_the_widened_matrix(
    quantization: Quantization, dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    num_rows, inner, outer = shape
    x = matrix(num_rows, inner, 1).to(dtype)
    quantized = quantize_rows(matrix(outer, inner, 0), quantization)
    exact = x.double() @ (quantized.values.double() * quantized.scale_inv[:, None].double()).T
    matrices = filled(quantization, dtype, outer, inner, 1)
    actual = matrices.grouped(x, [num_rows])
    # Of a wider x the matrix is widened no further than to the dtype it was made for.
    assert torch.equal(actual, matrices.grouped(x.float(), [num_rows]))
    assert relative_error(actual, exact) < (1e-6 if dtype is torch.float32 else 6e-3)


@pytest.mark.parametrize(
    ("quantization", "dtype"),
    [(Quantization.FP8, torch.bfloat16), (Quantization.FP8, torch.float32), (Quantization.INT8, torch.float32)],
)
def test_what_would_be_rounded_by_it_is_not_laid_out(quantization: Quantization, dtype: torch.dtype) -> None:
    matrices = filled(quantization, dtype, 3, 5, 2)
    assert matrices.lay_out() is matrices


@pytest.mark.parametrize("able", [True, False])
def test_int8_under_bfloat16_is_laid_out_where_the_cpu_has_products_of_8_bits(
    monkeypatch: pytest.MonkeyPatch, able: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_vnni": able})
    matrices = filled(Quantization.INT8, torch.bfloat16, 12, 20, 2)
    x, counts = matrix(5, 20, 9).bfloat16(), [2, 3]
    before = matrices.grouped(x, counts)
    laid_out = matrices.lay_out()
    assert (laid_out is not matrices) == able
    assert relative_error(laid_out.grouped(x, counts), before.double()) < 0.02


@BOTH
@pytest.mark.parametrize("elements", [1, 20, 64, 10**6])
def test_matrices_in_blocks_are_quantized_as_whole_ones(
    monkeypatch: pytest.MonkeyPatch, quantization: Quantization, elements: int
) -> None:
    monkeypatch.setattr("model_shards.quantization._BLOCK_ELEMENTS", elements)
    weights = [matrix(rows, 6, rows) for rows in (5, 1, 9)]
    whole, blocks = quantize_rows(torch.cat(weights), quantization), quantize_matrices(weights, quantization)
    assert torch.equal(blocks.values.view(torch.uint8), whole.values.view(torch.uint8))
    assert torch.equal(blocks.scale_inv, whole.scale_inv)


@BOTH
def test_the_matrices_of_one_expert_are_its_own(quantization: Quantization) -> None:
    matrices = filled(quantization, torch.float32, 4, 6, 3)
    x = matrix(5, 6, 9)
    for expert in range(3):
        counts = [5 if other == expert else 0 for other in range(3)]
        product = matrices.grouped(x, counts)
        assert relative_error(product, x @ matrix(4, 6, expert).T) < 0.1
        assert relative_error(product, x @ matrix(4, 6, (expert + 1) % 3).T) > 0.5


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantized_shard_equals_the_plain_loop_over_its_widened_weights(
    quantization: Quantization, dtype: torch.dtype
) -> None:
    config = model_config_of(make_hf_config(hidden_size=16, moe_intermediate_size=8, num_attention_heads=2))
    held = (6, 1, 3)
    shard = ExpertShardModel(config, held, dtype, CPU, quantization)
    slices, widened = dict(shard.hf_slices()), {}
    for seed, name in enumerate(name for name in slices if name.endswith(".weight")):
        quantized = quantize_rows(matrix(*slices[name].shape, seed, 0.3), quantization)
        slices[name].copy_(quantized.values)
        slices[name + "_scale_inv"].copy_(quantized.scale_inv)
        widened[name] = quantized.values.float() * quantized.scale_inv[:, None]
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn((9, 16), generator=generator).to(dtype)
    local_ids = torch.randint(-1, 3, (9, 4), generator=generator)
    weights = torch.rand((9, 4), generator=generator)
    expected = torch.zeros(9, 16)
    for row in range(9):
        for slot, local in enumerate(local_ids[row].tolist()):
            if local >= 0:
                expected[row] += weights[row, slot] * reference_expert(widened, 2, held[local], hidden[row].float())
    assert relative_error(shard(2, hidden, local_ids, weights), expected) < (1e-5 if dtype is torch.float32 else 0.02)
