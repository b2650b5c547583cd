"""Compiled writing and widening of latents in one byte an element against `model_shards.latent_codec`, bit for bit."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model_shards.config import ModelConfig
from model_shards.kernels import quantized_latents as module
from model_shards.kernels import rows
from model_shards.kernels.program import Call, float_bits
from model_shards.kernels.quantized_latents import QuantizedRow
from model_shards.kv_cache import LatentKVCache
from model_shards.quantization import Quantization
from tests.reference import CPU, make_hf_config, model_config_of

pytestmark = pytest.mark.usefixtures("built_for")

SIZES = ((16, 16), (64, 32), (512, 64))
both = pytest.mark.parametrize("kind", Quantization)


@functools.cache
def config_of(rank: int, rope: int) -> ModelConfig:
    return model_config_of(make_hf_config(kv_lora_rank=rank, qk_rope_head_dim=rope, num_hidden_layers=1))


def new_cache(blocks: int, block_size: int, rank: int, rope: int, kind: Quantization | None) -> LatentKVCache:
    return LatentKVCache(config_of(rank, rope), blocks, block_size, torch.bfloat16, CPU, kind)


def of_all_sizes(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    """Rows from tiny to large, and in each of them elements from nothing beside the largest to the largest."""
    numbers = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    return numbers * torch.logspace(-8, 8, rows)[:, None] * torch.logspace(-6, 0, width)


def widen(cache: LatentKVCache, blocks: torch.Tensor, tokens: int, threads: int = 1) -> torch.Tensor:
    """[tokens, R + O] and a row that nobody writes."""
    row = QuantizedRow(cache.rank, cache.rope, cache.quantization)
    assert row.bytes == cache.data.shape[-1]
    out = torch.full((tokens + 1, cache.rank + cache.rope), 7.0, dtype=torch.bfloat16)
    Call(
        module.widen(row),
        module.WIDEN_ARGUMENTS,
        tokens=tokens,
        block_size=cache.block_size,
        blocks=blocks.data_ptr(),
        cache=cache.layer(0).data_ptr(),
        out=out.data_ptr(),
    ).run(threads)
    assert bool((out[tokens] == 7).all())
    return out[:tokens]


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(Quantization),
    sizes=st.sampled_from(SIZES),
    block_size=st.sampled_from([1, 4, 5, 16]),
    tokens=st.integers(0, 40),
    threads=st.sampled_from([1, 3]),
)
def test_rows_are_widened_block_after_block(kind, sizes, block_size, tokens, threads) -> None:
    cache = new_cache(50, block_size, *sizes, kind)
    count = cache.num_blocks * block_size
    cache.write(0, torch.arange(count), of_all_sizes(count, sizes[0]), of_all_sizes(count, sizes[1], seed=1))
    blocks = torch.randperm(50, generator=torch.Generator().manual_seed(tokens))
    slots = (blocks[:, None] * block_size + torch.arange(block_size)).flatten()[:tokens]
    assert torch.equal(widen(cache, blocks, tokens, threads), cache.gather(0, slots))


@both
def test_every_value_there_is_is_widened(kind: Quantization) -> None:
    cache = new_cache(1, 1, 256, 16, kind)
    every = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    finite = every.view(kind.dtype).float().isfinite()
    for scale in (1.0, 0.3, 2.0**-100):
        cache.data[0, 0, 0, :4] = torch.tensor([scale]).view(torch.uint8)
        cache.data[0, 0, 0, 36:] = every
        found = widen(cache, torch.tensor([0]), 1)[0, :256]
        assert torch.equal(found[finite], (every.view(kind.dtype).float() * scale).bfloat16()[finite])


def write(code, cache: LatentKVCache, x, weight, rotary, slots, threads: int = 1) -> None:
    number = torch.tensor([len(x)])
    Call(
        code,
        rows.LATENTS_ARGUMENTS,
        rows=number.data_ptr(),
        x=x.data_ptr(),
        x_row=4 * x.stride(0),
        weight=weight.data_ptr(),
        eps=float_bits(1e-12),
        rotary=rotary.data_ptr(),
        slots=slots.data_ptr(),
        cache=cache.layer(0).data_ptr(),
        rank=cache.rank,
        rope=cache.rope,
    ).run(threads)


@settings(max_examples=30, deadline=None)
@given(
    kind=st.sampled_from(Quantization),
    sizes=st.sampled_from(SIZES),
    count=st.integers(0, 40),
    threads=st.sampled_from([1, 3]),
)
def test_what_is_written_is_what_the_codec_makes_of_the_plain_rows(kind, sizes, count, threads) -> None:
    rank, rope = sizes
    x = torch.cat((of_all_sizes(count, rank), of_all_sizes(count, rope + 8, seed=1)), dim=1)
    x[count // 2 :, :rank] = x[count // 2 :, :rank].round(decimals=1)  # with ties
    weight = (1 + of_all_sizes(1, rank, seed=2)[0]).bfloat16()
    rotary = torch.polar(torch.ones(count, rope // 2), torch.arange(count * rope // 2).view(count, rope // 2).float())
    slots = torch.randperm(48, generator=torch.Generator().manual_seed(count))[:count]
    plain, cache, expected = (new_cache(12, 4, rank, rope, quantization) for quantization in (None, kind, kind))
    write(rows.latents(), plain, x, weight, rotary, slots)
    write(module.latents(QuantizedRow(rank, rope, kind)), cache, x, weight, rotary, slots, threads)
    latents = plain.gather(0, slots)
    expected.write(0, slots, latents[:, :rank], latents[:, rank:])
    assert torch.equal(cache.data, expected.data)


@both
def test_numbers_between_two_go_to_the_nearest_and_in_the_middle_to_the_even_one(kind: Quantization) -> None:
    every = torch.arange(127, dtype=torch.int32).to(torch.uint8).view(kind.dtype).float()  # from 0 to the largest
    middle = (every[1:] + every[:-1]) / 2
    values = torch.cat((every, middle, middle * 1.0005, middle * 0.9995))
    values = torch.cat((values, -values))
    for part in torch.split(values, 240):
        # The first is the largest, and the scale 1; elements that are added are nothing.
        row = torch.cat((torch.tensor([float(kind.largest)]), part))
        row = torch.cat((row, torch.zeros(-len(row) % 16)))[None].bfloat16()
        found = torch.empty(row.shape[1], dtype=torch.uint8)
        _quantize(row, kind, found)
        expected = row[0].float()
        expected = (expected.round() if kind is Quantization.INT8 else expected).to(kind.dtype).view(torch.uint8)
        assert torch.equal(found, expected)


def _quantize(row: torch.Tensor, kind: Quantization, out: torch.Tensor) -> None:
    """kv_c of one row of bfloat16, without a norm."""
    build = module.Builder(("row", "out"))
    layout = QuantizedRow(row.shape[1], 0, kind)
    with build.only_first():
        module._quantize(build, layout, build.arguments["row"], build.arguments["out"])
    stored = torch.empty(layout.bytes, dtype=torch.uint8)
    Call(module.TeamFunction(build.finish()), ("row", "out"), row=row.data_ptr(), out=stored.data_ptr()).run(1)
    assert stored[:4].view(torch.float32).item() == 1
    out.copy_(stored[4:])


@both
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_in_its_own_row(kind: Quantization, value: float) -> None:
    cache = new_cache(2, 2, 32, 16, kind)
    x = torch.randn(3, 48, generator=torch.Generator().manual_seed(1))
    x[1, 5] = value
    rotary = torch.ones(3, 8, dtype=torch.complex64)
    write(module.latents(QuantizedRow(32, 16, kind)), cache, x, torch.ones(32).bfloat16(), rotary, torch.arange(3))
    found = widen(cache, torch.arange(2), 3)
    assert bool(found[1, :32].isnan().all())
    assert bool(found[[0, 2]].isfinite().all())
    assert bool(found[1, 32:].isfinite().all())


@both
def test_zeros_are_zeros_written_or_not(kind: Quantization) -> None:
    cache = new_cache(1, 4, 32, 16, kind)
    x, rotary = torch.zeros(1, 48), torch.ones(1, 8, dtype=torch.complex64)
    write(module.latents(QuantizedRow(32, 16, kind)), cache, x, torch.ones(32).bfloat16(), rotary, torch.tensor([2]))
    assert bool(cache.data.any())
    assert not widen(cache, torch.tensor([0]), 4).any()
