"""Latents in one byte an element: how near they are, and that a row depends on its own token alone."""

import pytest
import torch

from model_shards.kv_cache import LatentKVCache
from model_shards.latent_codec import QuantizedCodec, widen_fp8
from model_shards.quantization import Quantization
from model_shards.scratch import Scratch
from tests.reference import CPU, make_hf_config, model_config_of

CONFIG = model_config_of(make_hf_config(kv_lora_rank=30))  # a row of 4 + 30 bytes and 8 elements needs filling up
RANK = CONFIG.kv_lora_rank
both = pytest.mark.parametrize("kind", list(Quantization))
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def latents(rows: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.tensor([1e-3, 1.0, 50.0]).repeat(rows)[:rows, None]
    return torch.randn(rows, RANK, generator=generator) * scales, torch.randn(rows, 8, generator=generator)


@both
@dtypes
def test_a_row_comes_back_as_near_as_its_step_allows_and_k_pe_as_it_was(kind: Quantization, dtype: torch.dtype) -> None:
    codec = QuantizedCodec(CONFIG, torch.float32, kind)
    kv_c, k_pe = (part.to(dtype) for part in latents(9))
    found = codec.decode(codec.encode(kv_c, k_pe))
    largest = kv_c.float().abs().amax(-1, keepdim=True)
    # int8: half a step of largest / 127. fp8: half a unit of 3 bits behind the first, or half the smallest step.
    if kind is Quantization.INT8:
        allowed = (largest / 254).expand_as(kv_c)
    else:
        allowed = torch.maximum(kv_c.float().abs() / 16, largest / 448 * 2**-10)
    assert bool(((found[:, :RANK] - kv_c.float()).abs() <= allowed * 1.001).all())
    assert torch.equal(found[:, RANK:], k_pe.float())


@both
def test_no_other_token_has_a_part_in_a_row(kind: Quantization) -> None:
    codec = QuantizedCodec(CONFIG, torch.bfloat16, kind)
    kv_c, k_pe = latents(6)
    together = codec.encode(kv_c, k_pe)
    alone = torch.cat([codec.encode(kv_c[i : i + 1], k_pe[i : i + 1]) for i in range(6)])
    assert torch.equal(together, alone)


@both
def test_what_is_not_finite_stays_in_its_own_row(kind: Quantization) -> None:
    codec = QuantizedCodec(CONFIG, torch.float32, kind)
    kv_c, k_pe = latents(3)
    kv_c[1, 4] = float("nan")
    found = codec.decode(codec.encode(kv_c, k_pe))
    assert bool(found[1, :RANK].isnan().any())
    assert bool(found[[0, 2]].isfinite().all())


@both
def test_zeros_are_zeros_written_or_not(kind: Quantization) -> None:
    cache = LatentKVCache(CONFIG, 2, 4, torch.float32, CPU, kind)
    cache.write(0, torch.tensor([1]), torch.zeros(1, RANK), torch.zeros(1, 8))
    assert not cache.gather(0, torch.arange(8)).any()


@both
@dtypes
def test_rows_are_read_in_float32_gathered_or_where_they_lie(kind: Quantization, dtype: torch.dtype) -> None:
    cache = LatentKVCache(CONFIG, 3, 4, dtype, CPU, kind)
    cache.write(2, torch.arange(12), *latents(12))
    wide = QuantizedCodec(CONFIG, dtype, kind).widen(cache.layer(2).flatten(0, 1), Scratch(torch.float32, CPU))
    for slots, run in (([[7, 0, 3], [1, 1, 6]], None), ([[5, 6, 7, 8]], None), ([[5, 6, 7, 8]], 5)):
        rows = cache.read(2, torch.tensor(slots), run)
        assert torch.equal(rows, wide[torch.tensor(slots)])
        assert torch.equal(rows.to(dtype), cache.gather(2, torch.tensor(slots)))


@both
@dtypes
def test_a_token_written_again_gives_the_same_bytes(kind: Quantization, dtype: torch.dtype) -> None:
    cache = LatentKVCache(CONFIG, 3, 4, dtype, CPU, kind)
    cache.write(1, torch.tensor([2, 9, 4]), *latents(3))
    before = cache.data.clone()
    cache.write(1, torch.tensor([2, 9, 4]), *latents(3))
    assert torch.equal(cache.data, before)
    assert bool(cache.data[1].any())


def test_every_finite_fp8_is_widened_exactly() -> None:
    every = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn)
    finite = every[every.float().isfinite()]
    assert finite.shape == (254,)
    out = torch.empty(254)
    widen_fp8(finite, out)
    assert torch.equal(out, finite.float())
