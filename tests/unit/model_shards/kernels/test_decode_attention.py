"""Compiled attention of decodes against the formula in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model_shards.kernels import decode_attention as module
from model_shards.kernels.decode_attention import can_decode, decode_attention, decode_code
from model_shards.kernels.instructions import choose_instructions
from tests.reference import relative_error

SCALE = 0.07


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


needs_instructions = pytest.mark.skipif(
    not can_decode(torch.zeros(1, 4, 24, dtype=torch.bfloat16), 16), reason="a CPU without AVX512_BF16 has no such code"
)


@pytest.fixture(params=[1, 3])
def threads(request, monkeypatch) -> int:
    monkeypatch.setattr(module, "_WORK_OF_A_TEAM", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def paged(lengths: list[int], block_size: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A cache whose blocks lie anywhere, full of NaN past each context, and the tables."""
    blocks = [-(-length // block_size) for length in lengths]
    order = torch.randperm(sum(blocks) + 1, generator=torch.Generator().manual_seed(5))
    tables = torch.zeros(len(lengths), max(blocks) + 2, dtype=torch.int64)
    cache = random(sum(blocks) + 1, block_size, width, seed=6).bfloat16()
    cache[order[-1]] = float("nan")  # nobody's
    first = 0
    for row, (length, count) in enumerate(zip(lengths, blocks, strict=True)):
        tables[row, :count] = order[first : first + count]
        tables[row, count:] = order[-1]
        cache[tables[row, count - 1], (length - 1) % block_size + 1 :] = float("nan")
        first += count
    return cache, tables


def exact(queries, cache, tables, lengths, rank) -> torch.Tensor:
    out = torch.empty(*queries.shape[:2], rank, dtype=torch.float64)
    for row, length in enumerate(lengths):
        latents = cache[tables[row]].flatten(0, 1)[:length].double()
        weights = (queries[row].double() @ latents.T * SCALE).softmax(-1)
        out[row] = weights @ latents[:, :rank]
    return out


def attend(queries, cache, tables, lengths, rank, scale: float = SCALE) -> torch.Tensor:
    """Of queries [D, N, R + O], of which the last elements lie in a tensor of other strides."""
    apart = torch.full((*queries.shape[:2], queries.shape[2] - rank + 6), 3.0, dtype=torch.bfloat16)
    apart[..., 6:] = queries[..., rank:]
    latent = queries[..., :rank].contiguous()
    return decode_attention(latent, apart[..., 6:], cache, tables, torch.tensor(lengths), scale)


@needs_instructions
@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 700), min_size=1, max_size=4),
    block_size=st.sampled_from([2, 4, 6, 16, 48, 100, 256]),
    heads=st.sampled_from([1, 4, 16, 17, 40]),
    sizes=st.sampled_from([(16, 8), (48, 32), (64, 32), (128, 64)]),  # the last two are sizes for AMX
)
def test_it_is_the_softmax_over_each_context_and_nothing_else(lengths, block_size, heads, sizes) -> None:
    rank, rope = sizes
    cache, tables = paged(lengths, block_size, rank + rope)
    # From scores that are all alike to ones where a single token has all the weight.
    queries = (random(len(lengths), heads, rank + rope, seed=7) * torch.logspace(-1, 2, heads)[:, None]).bfloat16()
    mixed = attend(queries, cache, tables, lengths, rank)
    assert mixed.shape == (len(lengths), heads, rank)
    # Off by the roundings of probabilities and of the result to bfloat16, and by that of nothing else.
    assert relative_error(mixed, exact(queries, cache, tables, lengths, rank)) < 4e-3


@needs_instructions
def test_amx_decodes_what_is_of_whole_registers() -> None:
    chosen = choose_instructions(torch.bfloat16)
    has_amx = chosen is not None and chosen.amx
    for block_size, rank, rope, fits in ((16, 512, 64, True), (4, 512, 64, False), (16, 48, 32, False)):
        cache = torch.zeros(1, block_size, rank + rope, dtype=torch.bfloat16)
        assert (decode_code(cache, rank) is module._with_vectors()) is not (has_amx and fits)


@needs_instructions
@pytest.mark.parametrize(("rank", "rope"), [(32, 8), (64, 32)])
def test_threads_share_the_sequences_and_none_depends_on_another(threads, rank, rope) -> None:
    lengths = [300, 1, 17, 600, 16]
    cache, tables = paged(lengths, 16, rank + rope)
    queries = random(5, 20, rank + rope, seed=7).bfloat16()
    mixed = attend(queries, cache, tables, lengths, rank)
    assert relative_error(mixed, exact(queries, cache, tables, lengths, rank)) < 4e-3
    alone = attend(queries[3:4], cache, tables[3:4], lengths[3:4], rank)
    assert torch.equal(alone[0], mixed[3])
    cache[tables[2, 0], 5, 3] = float("nan")
    spoiled = attend(queries, cache, tables, lengths, rank)
    assert bool(spoiled[2].isnan().all())
    others = [0, 1, 3, 4]
    assert torch.equal(spoiled[others], mixed[others])


@needs_instructions
@pytest.mark.parametrize(("rank", "rope", "block_size"), [(16, 8, 4), (64, 32, 16)])
def test_scores_of_any_size_leave_a_softmax(rank, rope, block_size) -> None:
    cache = torch.zeros(1, block_size, rank + rope, dtype=torch.bfloat16)
    cache[0, :4, 0] = torch.tensor([1.0, -1.0, 0.5, 1.0])
    cache[0, :4, 1] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    queries = torch.zeros(1, 1, rank + rope, dtype=torch.bfloat16)
    queries[..., 0] = 1e20
    mixed = attend(queries, cache, torch.zeros(1, 1, dtype=torch.int64), [4], rank, scale=1.0)
    assert mixed[0, 0, 1].item() == pytest.approx(2.5)  # of the two that score highest, alike


@pytest.mark.parametrize(
    ("cache", "rank"),
    [
        (torch.zeros(1, 4, 24), 16),
        (torch.zeros(1, 4, 24, dtype=torch.uint8), 16),
        (torch.zeros(1, 4, 25, dtype=torch.bfloat16), 16),
        (torch.zeros(1, 4, 24, dtype=torch.bfloat16), 20),
        (torch.zeros(1, 258, 24, dtype=torch.bfloat16), 16),
        (torch.zeros(1, 5, 24, dtype=torch.bfloat16), 16),
    ],
)
def test_what_it_does_not_serve_is_told(cache, rank) -> None:
    assert not can_decode(cache, rank)
