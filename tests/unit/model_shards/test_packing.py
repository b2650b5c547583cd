"""Matrices laid out for the CPU against the same matrices as they lie."""

import pytest
import torch

from model_shards import packing
from model_shards.expert_matrix import make_expert_matrix
from model_shards.kernels.instructions import choose_instructions, int8_instructions
from model_shards.linear import FrozenLinear
from model_shards.packing import pack, pack_int8, quantize_activations
from model_shards.quantization import Quantization, quantize_rows
from tests.reference import CPU, relative_error


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_what_lies_in_float32_or_on_another_device_is_left_as_it_is() -> None:
    assert pack(torch.zeros(1, 2, 3)) is None
    assert pack(torch.zeros(1, 2, 3, dtype=torch.bfloat16, device="meta")) is None


@pytest.mark.parametrize(
    ("flags", "operand"),
    [
        ({"avx2": True, "fma3": True, "avx512_bf16": True}, torch.bfloat16),
        ({"avx2": True, "fma3": True, "avx512_bf16": True, "amx_bf16": True}, torch.bfloat16),
        ({"avx2": True, "fma3": True}, torch.float32),
        ({"avx2": True}, None),
        ({"neon": True}, None),
    ],
)
def test_the_layout_is_the_one_for_this_cpu(monkeypatch, flags, operand) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags)
    packed = pack(torch.zeros(1, 2, 3, dtype=torch.bfloat16))
    assert (None if packed is None else packed.instructions.operand_dtype) is operand


OWN = torch.cpu.get_capabilities()
# What this CPU has, then what lesser ones have.
CPUS = pytest.mark.parametrize(
    "flags", [OWN, {name: has for name, has in OWN.items() if "amx" not in name}, {"avx2": True, "fma3": True}, {}]
)


@CPUS
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
    assert linear(x[:0]).shape == (0, 3, 40)  # a rank without tokens takes part in a step
    assert linear.weight.numel() == (24 * 40 if choose_instructions(torch.bfloat16) is None else 0)


@CPUS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_linear_in_8_bits_is_near_the_one_it_was_made_of_whatever_the_cpu(monkeypatch, flags, dtype) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags)
    linear = FrozenLinear(64, 40, dtype, CPU, bias=True)
    linear.weight.data.copy_(random(40, 64))
    assert linear.bias is not None
    linear.bias.data.copy_(random(40, seed=1))
    x = random(2, 3, 64, seed=2).to(dtype)
    wide, weight = x.double(), linear.weight.double()
    exact = wide @ weight.T + linear.bias.double()
    rows = quantize_rows(linear.weight.data, Quantization.INT8)
    of_rounded = wide @ (rows.values.double() * rows.scale_inv.double()[:, None]).T + linear.bias.double()
    linear.lay_out_int8()
    after = linear(x)
    assert after.dtype is dtype
    assert after.shape == exact.shape
    assert 1e-3 < relative_error(after, exact) < 0.02
    if dtype is torch.float32:  # activations are not rounded
        assert relative_error(after, of_rounded) < 1e-6
    assert linear(x[:0]).shape == (0, 3, 40)
    assert linear.weight.numel() == 0


@CPUS
def test_a_linear_in_8_bits_widens_to_the_model_s_dtype_and_no_further(monkeypatch, flags) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags)
    linear = FrozenLinear(64, 40, torch.bfloat16, CPU)
    linear.weight.data.copy_(random(40, 64))
    linear.lay_out_int8()
    x = random(3, 64, seed=2).bfloat16()
    assert torch.equal(linear.product(x), linear.product(x.float()))
    assert linear.product(x).dtype is linear.product(x[:0]).dtype


@CPUS
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


VNNI = {name: OWN.get(name) for name in ("avx512_vnni", "avx_vnni")}
INT8_CPUS = pytest.mark.parametrize(
    "flags",
    [
        pytest.param(OWN, id="all of it"),
        pytest.param(VNNI, id="vectors"),
    ],
)
needs_int8 = pytest.mark.skipif(int8_instructions(OWN) is None, reason="a CPU without 8-bit dot products")


@needs_int8
@INT8_CPUS
def test_int8_products_are_exact_in_the_integers_and_rows_do_not_depend_on_each_other(monkeypatch, flags) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags)
    inputs = 64  # AMX takes so many at once
    weight = quantize_rows(random(20, inputs), Quantization.INT8)
    multiply = pack_int8(weight.values[None], weight.scale_inv[None])
    assert multiply is not None
    x = random(9, inputs, seed=1) * torch.logspace(-3, 3, 9)[:, None]
    quantized = quantize_activations(x)
    product = multiply(x, (9,))
    integers = (quantized.values.long() - packing.ZERO_POINT) @ weight.values.long().T
    exact = integers.double() * weight.scale_inv.double() * quantized.scale.double()
    assert relative_error(product, exact) < 1e-6
    assert torch.equal(multiply(x[3:4], (1,)), product[3:4])
    # Of the activations the error is half a step of 127 a row, and so it is of the matrix.
    assert relative_error(product, x.double() @ random(20, inputs).double().T) < 0.02


@needs_int8
@INT8_CPUS
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_gives_a_row_that_is_not_and_leaves_the_others(monkeypatch, flags, value) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags)
    weight = quantize_rows(random(4, 64), Quantization.INT8)
    multiply = pack_int8(weight.values[None], weight.scale_inv[None])
    assert multiply is not None
    x = random(3, 64, seed=1)
    expected = multiply(x, (3,))
    x[1, 5] = value
    product = multiply(x, (3,))
    assert not bool(product[1].isfinite().any())
    assert torch.equal(product[[0, 2]], expected[[0, 2]])
