"""What lies between the products of a layer against the same in torch."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from model_shards.kernels import rows as module
from model_shards.kernels.builder import Kind
from model_shards.kernels.program import Call, float_bits
from model_shards.packing import quantize_activations
from model_shards.quantization import SMALLEST_SCALE
from model_shards.rope import apply_rotary

SIZES = st.sampled_from([16, 48, 64, 160])
COUNTS = st.integers(0, 9)
EPS = 1e-3

pytestmark = pytest.mark.usefixtures("built_for")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def near(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Off by one rounding to bfloat16, or by what makes it go the other way."""
    return torch.allclose(actual.float(), expected.float(), rtol=2**-7, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(count=COUNTS, size=SIZES, threads=st.sampled_from([1, 3]))
def test_a_norm_reads_rows_that_lie_apart(count: int, size: int, threads: int) -> None:
    number, x, weight = torch.tensor([count]), random(count, size + 24), random(size, seed=1).bfloat16()
    out = torch.full((count + 1, size), 7.0, dtype=torch.bfloat16)
    Call(
        module.norm(),
        module.NORM_ARGUMENTS,
        rows=number.data_ptr(),
        x=x.data_ptr(),
        x_row=4 * x.stride(0),
        weight=weight.data_ptr(),
        eps=float_bits(EPS),
        out=out.data_ptr(),
        size=size,
    ).run(threads)
    assert near(out[:count], F.rms_norm(x[:, :size], (size,), weight.float(), EPS))
    assert bool((out[count] == 7).all())


@settings(max_examples=25, deadline=None)
@given(
    count=COUNTS,
    size=SIZES,
    addends=st.sampled_from([(), (Kind.FLOAT32,), (Kind.BFLOAT16,), (Kind.FLOAT32, Kind.BFLOAT16)]),
)
def test_what_is_added_to_the_residual_is_in_the_norm(count: int, size: int, addends: tuple[Kind, ...]) -> None:
    number, weight = torch.tensor([count]), random(size, seed=1).bfloat16()
    residual, floats, halves = (
        random(count, size, seed=2).bfloat16(),
        random(count, size + 8, seed=3),
        random(count, size, seed=4).bfloat16(),
    )
    expected = residual.float()
    if Kind.FLOAT32 in addends:
        expected = expected + floats[:, :size]
    if Kind.BFLOAT16 in addends:
        expected = expected + halves.float()
    expected = expected.bfloat16()
    out = torch.empty(count, size, dtype=torch.bfloat16)
    Call(
        module.residual_norm(addends),
        module.RESIDUAL_ARGUMENTS,
        rows=number.data_ptr(),
        residual=residual.data_ptr(),
        float_addend=floats.data_ptr(),
        float_row=4 * (size + 8),
        bfloat_addend=halves.data_ptr(),
        weight=weight.data_ptr(),
        eps=float_bits(EPS),
        out=out.data_ptr(),
        size=size,
    ).run(1)
    assert torch.equal(residual, expected)
    assert near(out, F.rms_norm(expected.float(), (size,), weight.float(), EPS))


@settings(max_examples=25, deadline=None)
@given(count=COUNTS, rank=SIZES, rope=st.sampled_from([16, 64]))
def test_latents_go_to_their_slots(count: int, rank: int, rope: int) -> None:
    number, x = torch.tensor([count]), random(count, rank + rope + 5)
    weight, rotary = (
        random(rank, seed=1).bfloat16(),
        torch.polar(torch.ones(count, rope // 2), random(count, rope // 2)),
    )
    slots = torch.randperm(20, generator=torch.Generator().manual_seed(2))[:count].contiguous()
    cache = torch.full((20, rank + rope), 7.0, dtype=torch.bfloat16)
    Call(
        module.latents(),
        module.LATENTS_ARGUMENTS,
        rows=number.data_ptr(),
        x=x.data_ptr(),
        x_row=4 * x.stride(0),
        weight=weight.data_ptr(),
        eps=float_bits(EPS),
        rotary=rotary.data_ptr(),
        slots=slots.data_ptr(),
        cache=cache.data_ptr(),
        rank=rank,
        rope=rope,
    ).run(1)
    expected = torch.full_like(cache, 7.0)
    normed = F.rms_norm(x[:, :rank], (rank,), weight.float(), EPS)
    expected[slots] = torch.cat((normed, apply_rotary(x[:, rank : rank + rope], rotary)), dim=1).bfloat16()
    assert near(cache, expected)


def test_the_rotated_part_of_each_head_is_rotated_and_no_other() -> None:
    x, rotary = random(5, 3 * 48), torch.polar(torch.ones(5, 8), random(5, 8, seed=1))
    out, number = torch.empty(5, 3, 48, dtype=torch.bfloat16), torch.tensor([5])
    Call(
        module.queries(),
        module.QUERIES_ARGUMENTS,
        rows=number.data_ptr(),
        x=x.data_ptr(),
        x_row=4 * x.stride(0),
        rotary=rotary.data_ptr(),
        out=out.data_ptr(),
        heads=3,
        nope=32,
        rope=16,
    ).run(1)
    heads = x.view(5, 3, 48)
    assert torch.equal(out[..., :32], heads[..., :32].bfloat16())
    assert near(out[..., 32:], apply_rotary(heads[..., 32:], rotary[:, None]))


def swiglu(x: torch.Tensor, size: int, quantized: bool) -> tuple[torch.Tensor, torch.Tensor]:
    number, scales = torch.tensor([len(x)]), torch.empty(len(x))
    out = torch.empty(len(x), size, dtype=torch.uint8 if quantized else torch.bfloat16)
    Call(
        module.swiglu(quantized),
        module.SWIGLU_ARGUMENTS,
        rows=number.data_ptr(),
        x=x.data_ptr(),
        x_row=4 * x.stride(0),
        out=out.data_ptr(),
        scales=scales.data_ptr(),
        size=size,
    ).run(1)
    return out, scales


def test_swiglu_of_numbers_of_any_size() -> None:
    x = random(4, 2 * 48 + 3) * torch.logspace(-3, 3, 4)[:, None]
    x[0, 0], x[0, 1], x[0, 2] = 1e30, -1e30, float("nan")
    out, _ = swiglu(x, 48, quantized=False)
    expected = F.silu(x[:, :48]) * x[:, 48:96]
    assert bool(out[0, 2].isnan())
    expected[0, 2] = 0
    assert near(out.nan_to_num(0.0), expected)


@pytest.mark.parametrize("spoiled", [None, float("nan"), float("inf")])
def test_quantized_rows_are_those_of_the_tensor_code(spoiled: float | None) -> None:
    x = random(6, 2 * 48)
    x[4] = 0.0
    if spoiled is not None:
        x[2, 48] = spoiled
    expected = quantize_activations(F.silu(x[:, :48]) * x[:, 48:96])
    values, scales = swiglu(x, 48, quantized=True)
    finite = torch.ones(6, dtype=torch.bool)
    finite[2] = spoiled is None
    assert bool((values[finite].int() - expected.values[finite].int()).abs().max() <= 1)  # a tie, decided otherwise
    assert torch.allclose(scales[finite], expected.scale[finite, 0], rtol=1e-5)
    assert scales[4].item() == pytest.approx(SMALLEST_SCALE)
    assert bool(scales[2].isfinite()) is (spoiled is None)
