"""Compiled attention of prefill chunks against the formula in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model_shards.kernels.grouped_product import PackedMatrices
from model_shards.kernels.instructions import Arithmetic, Instructions, choose_instructions
from model_shards.kernels.prefill_attention import PrefillAttention, serves
from model_shards.kernels.prefill_ir import BLOCK, HeadShape
from tests.reference import relative_error

HEADS = 3
VECTORS = Instructions(Arithmetic.DOT, lanes=16, vectors=4, rows=6)
CHOSEN = choose_instructions(torch.bfloat16)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


class Case:
    """A shape of heads with the instructions that it is computed with."""

    def __init__(self, shape: HeadShape, instructions: Instructions) -> None:
        self.shape = shape
        self.instructions = instructions
        # Scores of random queries and latents are of the same size, whatever the shape.
        self.scale = 2.4 / (shape.nope * shape.rank + shape.rope) ** 0.5
        self.w_uk = random(HEADS, shape.nope, shape.rank, seed=1)
        self.w_uv = random(HEADS, shape.value, shape.rank, seed=2)

    def new_attention(self) -> PrefillAttention:
        return PrefillAttention(self.shape, HEADS, self.scale, self.instructions)

    def queries(self, count: int, seed: int = 3) -> torch.Tensor:
        return random(count, HEADS, self.shape.nope + self.shape.rope, seed=seed)

    def latents(self, count: int, seed: int = 4) -> torch.Tensor:
        return random(count, self.shape.rank + self.shape.rope, seed=seed)

    def exact(self, queries: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        new, context = queries.shape[0], latents.shape[0]
        kv_c, k_pe = latents.double().split([self.shape.rank, self.shape.rope], dim=1)
        k_nope = kv_c @ self.w_uk.double().transpose(1, 2)
        keys = torch.cat((k_nope, k_pe.expand(HEADS, -1, -1)), dim=-1)  # [N, C, P + O]
        scores = torch.einsum("qnd,ncd->nqc", queries.double(), keys) * self.scale
        later = torch.arange(context)[None] > torch.arange(context - new, context)[:, None]
        weights = scores.masked_fill(later, float("-inf")).softmax(-1)
        return torch.einsum("nqc,ncv->qnv", weights, kv_c @ self.w_uv.double().transpose(1, 2))

    def attend(
        self, attention: PrefillAttention, queries: torch.Tensor, latents: torch.Tensor, threads: int = 1
    ) -> torch.Tensor:
        out = torch.full((queries.shape[0], HEADS, self.shape.value), 7.0, dtype=torch.bfloat16)
        w_uv = PackedMatrices(self.w_uv, self.instructions)
        attention.attend(queries, lambda start, stop: latents[start:stop], len(latents), self.w_uk, w_uv, out, threads)
        return out


SMALL = HeadShape(nope=6, rope=4, rank=10, value=64)
# AMX takes whole multiples of 32 elements, of a key and of a latent; the vector instructions take any.
CASES = {"vectors": Case(SMALL, VECTORS)}
if CHOSEN is not None and CHOSEN.amx:
    CASES["amx"] = Case(HeadShape(nope=48, rope=16, rank=32, value=64), CHOSEN)
    CASES["amx, which does not fit"] = Case(SMALL, CHOSEN)
pytestmark = pytest.mark.skipif(
    CHOSEN is None or CHOSEN.arithmetic is not Arithmetic.DOT, reason="a CPU without AVX512_BF16"
)


@pytest.fixture(scope="module", params=CASES)
def case(request) -> Case:
    return CASES[request.param]


@settings(max_examples=40, deadline=None)
@given(
    new=st.integers(1, 250),
    past=st.sampled_from([0, 1, 63, 64, 65, 200, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 30]),
    threads=st.sampled_from([1, 3]),
    size=st.sampled_from([0.1, 1.0, 8.0]),
)
def test_each_new_token_attends_to_all_before_it_and_itself(
    case: Case, new: int, past: int, threads: int, size: float
) -> None:
    attention = case.new_attention()
    # What another chunk left in its memory, which is longer, must not be met again.
    case.attend(attention, case.queries(300, seed=9) * 50, case.latents(2 * BLOCK, seed=8) * 50)
    queries, latents = case.queries(new) * size, case.latents(past + new)
    # Keys are rounded, so large scores are off by as much.
    bound = 0.03 if size > 1 else 0.01
    assert relative_error(case.attend(attention, queries, latents, threads), case.exact(queries, latents)) < bound


def test_the_number_of_threads_changes_nothing(case) -> None:
    queries, latents = case.queries(300), case.latents(700)
    attention = case.new_attention()
    assert torch.equal(case.attend(attention, queries, latents, 3), case.attend(attention, queries, latents, 1))


def test_a_token_that_is_not_finite_spoils_what_attends_to_it(case) -> None:
    queries, latents = case.queries(100), case.latents(300)
    attention = case.new_attention()
    latents[70, 2] = float("nan")
    assert bool(case.attend(attention, queries, latents).isnan().all())
    latents[70, 2] = 0.0
    assert bool(case.attend(attention, queries, latents).isfinite().all())


def test_what_it_does_not_serve_is_told() -> None:
    assert serves(SMALL, VECTORS)
    assert not serves(HeadShape(nope=6, rope=4, rank=10, value=32), VECTORS)
    assert not serves(HeadShape(nope=5, rope=4, rank=10, value=64), VECTORS)
    widened = Instructions(Arithmetic.WIDEN, lanes=16, vectors=4, rows=6)
    assert not serves(SMALL, widened)
