"""Compiled attention of prefill chunks against the formula in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model_shards.kernels.grouped_product import PackedMatrices
from model_shards.kernels.instructions import bfloat16_instructions
from model_shards.kernels.prefill_attention import PrefillAttention, serves
from model_shards.kernels.prefill_ir import BLOCK, INSTRUCTIONS, HeadShape
from tests.reference import relative_error

SHAPE = HeadShape(nope=6, rope=4, rank=10, value=64)
HEADS = 3
SCALE = 0.3

pytestmark = pytest.mark.skipif(
    bfloat16_instructions(torch.cpu.get_capabilities()) != INSTRUCTIONS, reason="a CPU without AVX512_BF16"
)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


W_UK = random(HEADS, SHAPE.nope, SHAPE.rank, seed=1)
W_UV = random(HEADS, SHAPE.value, SHAPE.rank, seed=2)


def exact(queries: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    new, context = queries.shape[0], latents.shape[0]
    kv_c, k_pe = latents.double().split([SHAPE.rank, SHAPE.rope], dim=1)
    keys = torch.cat((kv_c @ W_UK.double().transpose(1, 2), k_pe.expand(HEADS, -1, -1)), dim=-1)  # [N, C, P + O]
    scores = torch.einsum("qnd,ncd->nqc", queries.double(), keys) * SCALE
    later = torch.arange(context)[None] > torch.arange(context - new, context)[:, None]
    weights = scores.masked_fill(later, float("-inf")).softmax(-1)
    return torch.einsum("nqc,ncv->qnv", weights, kv_c @ W_UV.double().transpose(1, 2))


def attend(attention: PrefillAttention, queries: torch.Tensor, latents: torch.Tensor, threads: int = 1) -> torch.Tensor:
    out = torch.full((queries.shape[0], HEADS, SHAPE.value), 7.0, dtype=torch.bfloat16)
    w_uv = PackedMatrices(W_UV, INSTRUCTIONS)
    attention.attend(queries, lambda start, stop: latents[start:stop], len(latents), W_UK, w_uv, out, threads)
    return out


@settings(max_examples=40, deadline=None)
@given(
    new=st.integers(1, 250),
    past=st.sampled_from([0, 1, 63, 64, 65, 200, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 30]),
    threads=st.sampled_from([1, 3]),
    size=st.sampled_from([0.1, 1.0, 8.0]),
)
def test_each_new_token_attends_to_all_before_it_and_itself(new: int, past: int, threads: int, size: float) -> None:
    attention = PrefillAttention(SHAPE, HEADS, SCALE)
    # What another chunk left in its memory, which is longer, must not be met again.
    attend(attention, random(300, HEADS, 10, seed=9) * 50, random(2 * BLOCK, 14, seed=8) * 50)
    queries, latents = random(new, HEADS, 10, seed=3) * size, random(past + new, 14, seed=4)
    # Keys are rounded, so large scores are off by as much.
    bound = 0.03 if size > 1 else 0.01
    assert relative_error(attend(attention, queries, latents, threads), exact(queries, latents)) < bound


def test_the_number_of_threads_changes_nothing() -> None:
    queries, latents = random(300, HEADS, 10, seed=3), random(700, 14, seed=4)
    attention = PrefillAttention(SHAPE, HEADS, SCALE)
    assert torch.equal(attend(attention, queries, latents, 3), attend(attention, queries, latents, 1))


def test_a_token_that_is_not_finite_spoils_what_attends_to_it() -> None:
    queries, latents = random(100, HEADS, 10, seed=3), random(300, 14, seed=4)
    attention = PrefillAttention(SHAPE, HEADS, SCALE)
    latents[70, 2] = float("nan")
    assert bool(attend(attention, queries, latents).isnan().all())
    latents[70, 2] = 0.0
    assert bool(attend(attention, queries, latents).isfinite().all())


def test_what_it_does_not_serve_is_told() -> None:
    assert serves(SHAPE)
    assert not serves(HeadShape(nope=6, rope=4, rank=10, value=32))
    assert not serves(HeadShape(nope=5, rope=4, rank=10, value=64))
