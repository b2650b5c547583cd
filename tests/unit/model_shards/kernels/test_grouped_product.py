"""Compiled products against the same in float64, for every set of instructions that the CPU at hand has."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model_shards.kernels import grouped_product, instructions
from model_shards.kernels.grouped_product import PackedMatrices, Scaling
from model_shards.kernels.instructions import (
    Arithmetic,
    Instructions,
    bfloat16_instructions,
    choose_instructions,
    int8_instructions,
)
from tests.reference import relative_error

ABLE = torch.cpu.get_capabilities()
AMX = ABLE.get("amx_tile") and torch.cpu._init_amx()
CHOSEN = choose_instructions(torch.bfloat16), choose_instructions(torch.int8)
# Not only those that are chosen here: a wider CPU has the narrower ones too.
PLAIN = [
    how
    for able, how in (
        (AMX and ABLE.get("amx_bf16"), Instructions(Arithmetic.DOT, lanes=16, vectors=4, rows=16, amx=True)),
        (ABLE.get("avx512_bf16"), Instructions(Arithmetic.DOT, lanes=16, vectors=4, rows=6)),
        (ABLE.get("avx512_f"), Instructions(Arithmetic.WIDEN, lanes=16, vectors=4, rows=6)),
        (ABLE.get("fma3"), Instructions(Arithmetic.WIDEN, lanes=8, vectors=2, rows=6)),
    )
    if able
]
INTEGER = [
    how
    for able, how in (
        (AMX and ABLE.get("amx_int8"), Instructions(Arithmetic.INTEGER, lanes=16, vectors=4, rows=16, amx=True)),
        (ABLE.get("avx512_vnni"), Instructions(Arithmetic.INTEGER, lanes=16, vectors=4, rows=6)),
        (
            ABLE.get("avx_vnni") or (ABLE.get("avx512_vnni") and ABLE.get("avx512_vl")),
            Instructions(Arithmetic.INTEGER, lanes=8, vectors=2, rows=6),
        ),
    )
    if able
]
# AMX takes whole multiples of 32 and of 64.
INPUTS = st.one_of(st.integers(1, 70), st.sampled_from([32, 64, 96, 128, 192]))


def name(how: Instructions) -> str:
    return f"{how.arithmetic.value}-{_width(how)}"


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def exact(x: torch.Tensor, weight: torch.Tensor, counts: list[int]) -> torch.Tensor:
    parts = zip(x.double().split(counts), weight.double(), strict=True)
    return torch.cat([rows @ matrix.T for rows, matrix in parts])


@pytest.fixture(params=[1, 3])
def threads(request, monkeypatch) -> int:
    monkeypatch.setattr(grouped_product, "BYTES_OF_A_TEAM", 1)  # small matrices are worth a thread, too
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_what_is_chosen_on_this_cpu_is_tested() -> None:
    assert CHOSEN[0] in [*PLAIN, None]
    assert CHOSEN[1] in [*INTEGER, None]


@pytest.mark.parametrize("how", PLAIN, ids=name)
@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    outputs=st.integers(1, 140),
    inputs=INPUTS,
)
def test_each_matrix_multiplies_its_rows_whatever_the_shape(how, counts, outputs, inputs) -> None:
    weight = random(len(counts), outputs, inputs).bfloat16()
    x = random(sum(counts), inputs, seed=1).bfloat16()
    packed = PackedMatrices(weight, how)
    expected = exact(x, weight, counts)
    weight.fill_(float("nan"))  # a copy was taken
    product = packed.multiply(x.to(how.operand_dtype), counts)
    assert product.dtype is torch.float32
    assert product.shape == expected.shape
    # Each is a sum of exact products in float32: off by its roundings, of terms as large as these.
    assert bool(((product.double() - expected).abs() <= 1e-6 * inputs).all())


@pytest.mark.parametrize("how", PLAIN, ids=name)
def test_threads_share_the_tiles_and_a_row_does_not_depend_on_the_others(how, threads) -> None:
    counts = [7, 0, 1, 20]
    weight = random(4, 300, 96).bfloat16()
    x = random(28, 96, seed=1).to(how.operand_dtype)
    packed = PackedMatrices(weight, how)
    product = packed.multiply(x, counts)
    assert relative_error(product, exact(x, weight, counts)) < 1e-5
    assert torch.equal(packed.multiply(x[10:11], [0, 0, 0, 1]), product[10:11])
    x[3, 5] = float("nan")
    spoiled = packed.multiply(x, counts)
    assert bool(spoiled[3].isnan().all())
    assert torch.equal(spoiled[4:], product[4:])
    assert torch.equal(spoiled[:3], product[:3])


@pytest.mark.parametrize("how", INTEGER, ids=name)
@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    outputs=st.integers(1, 140),
    inputs=INPUTS,
)
def test_integers_are_exact_before_they_are_scaled(how, counts, outputs, inputs) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randint(-127, 128, (len(counts), outputs, inputs), generator=generator).to(torch.int8)
    x = torch.randint(0, 256, (sum(counts), inputs), generator=generator).to(torch.uint8)
    packed = PackedMatrices(weight, how)
    shape = (len(counts), packed.padded_outputs)
    zero_sums = torch.randint(-1000, 1000, shape, generator=generator).int()
    scales, row_scales = torch.rand(shape, generator=generator), torch.rand(x.shape[0], generator=generator)
    product = packed.multiply_scaled(x, counts, Scaling(zero_sums, scales, row_scales))
    of_row = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    integers = exact(x, weight, counts) - zero_sums[of_row, :outputs]
    expected = integers * scales[of_row, :outputs].double() * row_scales.double()[:, None]
    assert product.shape == expected.shape
    assert bool(((product.double() - expected).abs() <= 1e-6 * expected.abs()).all())


@pytest.mark.parametrize("how", PLAIN, ids=name)
@pytest.mark.parametrize("outputs", [128, 70])
def test_products_go_where_they_are_wanted_and_nowhere_else(how, outputs) -> None:
    counts = [3, 0, 9]
    weight = random(3, outputs, 24).bfloat16()
    x = random(12, 24, seed=1).to(how.operand_dtype)
    packed = PackedMatrices(weight, how)
    expected = exact(x, weight, counts)
    out = torch.full((12, outputs + 8), 7.0)
    packed.multiply(x, counts, out)
    assert relative_error(out[:, :outputs], expected) < 1e-5
    assert bool((out[:, outputs:] == 7).all())
    apart = torch.full((24, outputs), 7.0)
    packed.multiply(x, counts, apart[::2])
    assert relative_error(apart[::2], expected) < 1e-5
    assert bool((apart[1::2] == 7).all())


@pytest.mark.parametrize("how", PLAIN, ids=name)
@pytest.mark.parametrize("matrices", [slice(1, 3), slice(0, 5), slice(4, 5)], ids=str)
def test_each_of_some_matrices_multiplies_the_same_rows(how, matrices, threads) -> None:
    weight = random(5, 3 * how.width, 24).bfloat16()
    x = random(13, 24, seed=1).to(how.operand_dtype)
    count, outputs = matrices.stop - matrices.start, weight.shape[1]
    out = torch.full((13 * count, outputs + 16), 7.0)
    PackedMatrices(weight, how).multiply_each(x, matrices, out)
    assert relative_error(out[:, :outputs], exact(x.repeat(count, 1), weight[matrices], [13] * count)) < 1e-5
    assert bool((out[:, outputs:] == 7).all())


@pytest.mark.parametrize("how", PLAIN[:1] + INTEGER[:1], ids=name)
def test_what_does_not_fit_is_refused(how) -> None:
    packed = PackedMatrices(torch.zeros(2, 8, 8, dtype=how.weight_dtype), how)
    x = torch.zeros(3, 8, dtype=how.operand_dtype)
    with pytest.raises(AssertionError, match="each row belongs"):
        packed.multiply(x, [1, 1])
    with pytest.raises(AssertionError, match="laid out for"):
        packed.multiply(x.double(), [1, 2])


@pytest.mark.parametrize(
    ("flags", "plain", "integer"),
    [
        ({"avx512_bf16": True, "avx512_f": True, "avx512_vnni": True, "avx2": True, "fma3": True}, "dot 16", "16"),
        ({"avx512_bf16": True, "avx512_vnni": True, "amx_tile": True, "amx_bf16": True}, "dot amx", "16"),
        ({"avx512_bf16": True, "avx512_vnni": True, "amx_tile": True, "amx_int8": True}, "dot 16", "amx"),
        ({"avx512_bf16": True, "avx512_vnni": True, "amx_int8": True, "amx_bf16": True}, "dot 16", "16"),
        ({"avx512_f": True, "avx512_vnni": True, "avx2": True, "fma3": True}, "widen 16", "16"),
        ({"avx2": True, "fma3": True, "avx_vnni": True}, "widen 8", "8"),
        ({"avx2": True, "fma3": True}, "widen 8", None),
        ({"avx2": True}, None, None),
        ({"neon": True}, None, None),
    ],
)
def test_a_cpu_gets_the_widest_that_it_has(flags, plain, integer) -> None:
    chosen, chosen_integer = bfloat16_instructions(flags), int8_instructions(flags)
    assert (None if chosen is None else f"{chosen.arithmetic.value} {_width(chosen)}") == plain
    assert (None if chosen_integer is None else _width(chosen_integer)) == integer


def _width(how: Instructions) -> str:
    return "amx" if how.amx else str(how.lanes)


def test_amx_is_used_when_the_kernel_lets_a_process_have_it(monkeypatch) -> None:
    flags = {"avx512_bf16": True, "avx512_vnni": True, "amx_tile": True, "amx_bf16": True, "amx_int8": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags)
    for lets in (True, False):
        monkeypatch.setattr(instructions, "_may_use_amx", lambda lets=lets: lets)
        for dtype in (torch.bfloat16, torch.int8):
            chosen = choose_instructions(dtype)
            assert chosen is not None
            assert chosen.amx is lets
