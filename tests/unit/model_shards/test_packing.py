"""Matrices laid out for the CPU against the same matrices as they lie."""

import pytest
import torch

from model_shards import packing
from model_shards.expert_matrix import make_expert_matrix
from model_shards.linear import FrozenLinear
from model_shards.packing import PackedInt8, choose_packing, quantize_activations
from model_shards.quantization import Quantization, quantize_rows
from tests.reference import CPU, relative_error

PACKERS = pytest.mark.parametrize("pack", [packing._pack_blocked, packing._pack_half])
OPERANDS = {packing._pack_blocked: torch.bfloat16, packing._pack_half: torch.float32}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@PACKERS
@pytest.mark.parametrize("shape", [(0, 64, 32), (1, 1, 1), (1, 64, 32), (3, 33, 17), (40, 192, 130)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_laid_out_matrix_gives_the_product_and_keeps_nothing_of_the_original(pack, shape, with_bias) -> None:
    rows, inner, outer = shape
    weight = random(outer, inner).bfloat16()
    bias = random(outer, seed=1).bfloat16() if with_bias else None
    x = random(rows, inner, seed=2).bfloat16()
    exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    multiply = pack(weight, bias)
    weight.fill_(float("nan"))
    product = multiply(x.to(OPERANDS[pack]))
    assert product.dtype is OPERANDS[pack]
    assert product.shape == exact.shape
    assert not rows or relative_error(product, exact) < 6e-3


def test_half_keeps_every_digit_of_bfloat16_and_what_is_below_its_steps_to_the_step() -> None:
    weight = torch.tensor([[1.0078125, -0.00390625, 65280.0, 2.0**-24, 3e-8, 1e-30]], dtype=torch.bfloat16)
    each = torch.stack([packing._pack_half(weight, None)(row[None])[0, 0] for row in torch.eye(6)])
    assert torch.equal(each[:4], weight[0, :4].float())
    assert bool(((each - weight[0].float()).abs() <= 2.0**-25).all())


def test_a_matrix_beyond_the_range_of_half_stays_exact() -> None:
    weight = torch.tensor([[1e30, 1.0], [-70000.0, 2.0]], dtype=torch.bfloat16)
    product = packing._pack_half(weight, None)(torch.eye(2))
    assert torch.equal(product, weight.float().T)


def test_what_lies_in_float32_or_on_another_device_is_left_as_it_is() -> None:
    assert choose_packing(torch.float32, CPU) is None
    assert choose_packing(torch.bfloat16, torch.device("cuda")) is None


@pytest.mark.parametrize(
    ("flags", "operand"),
    [
        ({"avx2": True, "fma3": True, "f16c": True, "avx512_bf16": True}, torch.bfloat16),
        ({"avx2": True, "fma3": True, "f16c": True, "amx_bf16": True}, torch.bfloat16),
        ({"avx2": True, "fma3": True, "f16c": True}, torch.float32),
        ({"avx2": True, "fma3": True}, None),
        ({"neon": True}, None),
    ],
)
def test_the_layout_is_the_one_for_this_cpu(monkeypatch, flags, operand) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags)
    chosen = choose_packing(torch.bfloat16, CPU)
    assert (None if chosen is None else chosen.operand) is operand


@pytest.mark.parametrize("flags", [{"avx2": True, "fma3": True, "f16c": True}, {"avx512_bf16": True}, {}])
def test_a_linear_gives_the_same_before_and_after_whatever_the_cpu(monkeypatch, flags) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags)
    linear = FrozenLinear(24, 40, torch.bfloat16, CPU, bias=True)
    linear.weight.data.copy_(random(40, 24))
    assert linear.bias is not None
    linear.bias.data.copy_(random(40, seed=1))
    x = random(2, 3, 24, seed=2).bfloat16()
    before = linear(x)
    linear.lay_out()
    after = linear(x)
    assert after.dtype is torch.bfloat16
    assert after.shape == before.shape
    assert relative_error(after, before.double()) < 6e-3
    assert linear.weight.numel() == (0 if flags else 24 * 40)


@pytest.mark.parametrize("flags", [{"avx2": True, "fma3": True, "f16c": True}, {"avx512_bf16": True}, {}])
def test_each_expert_multiplies_its_own_rows(monkeypatch, flags) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags)
    matrices = make_expert_matrix(4, 6, 5, torch.bfloat16, CPU, None)
    weight = random(4, 5, 6).bfloat16()
    matrices.weight.data.copy_(weight)
    x = random(7, 6, seed=1).bfloat16()
    counts = [2, 0, 4, 1]
    exact = torch.cat([rows.double() @ weight[e].double().T for e, rows in enumerate(x.split(counts))])
    laid_out = matrices.lay_out()
    assert matrices.weight.numel() == (weight.numel() if laid_out is matrices else 0)
    assert relative_error(laid_out.grouped(x, counts), exact) < 6e-3


def test_activations_keep_their_scale_and_zero_whatever_their_size() -> None:
    x = torch.tensor([[0.0, 0.0], [1e-30, -5e-31], [3e4, 127.0], [-1.0, 1.0]])
    quantized = quantize_activations(x)
    back = (quantized.values.double() - packing.ZERO_POINT) * quantized.scale.double()
    assert bool(((back - x.double()).abs() <= 0.5 * quantized.scale.double() * (1 + 1e-4)).all())
    assert back[0].tolist() == [0.0, 0.0]


def test_int8_products_are_exact_in_the_integers_and_rows_do_not_depend_on_each_other() -> None:
    weight = quantize_rows(random(20, 30), Quantization.INT8)
    packed = PackedInt8(weight.values, weight.scale_inv, torch.zeros(weight.values.shape[0], dtype=torch.int64))
    x = random(9, 30, seed=1) * torch.logspace(-3, 3, 9)[:, None]
    quantized = quantize_activations(x)
    product = packed.multiply(quantized.values) * quantized.scale
    integers = (quantized.values.long() - packing.ZERO_POINT) @ weight.values.long().T
    exact = integers.double() * weight.scale_inv.double() * quantized.scale.double()
    assert relative_error(product, exact) < 1e-6
    one = quantize_activations(x[3:4])
    assert torch.equal(packed.multiply(one.values) * one.scale, product[3:4])
    # Of the activations the error is half a step of 127 a row, and so it is of the matrix.
    assert relative_error(product, x.double() @ random(20, 30).double().T) < 0.02


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_gives_a_row_that_is_not_and_leaves_the_others(value: float) -> None:
    weight = quantize_rows(random(4, 8), Quantization.INT8)
    packed = PackedInt8(weight.values, weight.scale_inv, torch.zeros(weight.values.shape[0], dtype=torch.int64))
    x = random(3, 8, seed=1)
    expected = quantize_activations(x)
    x[1, 5] = value
    spoiled = quantize_activations(x)
    product = packed.multiply(spoiled.values) * spoiled.scale
    assert not bool(product[1].isfinite().any())
    for row in (0, 2):
        assert torch.equal(product[row], (packed.multiply(expected.values) * expected.scale)[row])
