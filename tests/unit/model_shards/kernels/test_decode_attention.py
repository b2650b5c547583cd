"""Compiled attention of decodes against the formula in float64."""

import functools
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model_shards.config import ModelConfig
from model_shards.kernels import decode_amx
from model_shards.kernels import decode_attention as module
from model_shards.kernels.decode_attention import can_decode, decode_attention, decode_code
from model_shards.kernels.decode_parts import slot_floats
from model_shards.kernels.instructions import choose_instructions
from model_shards.kernels.machine_code import TeamFunction
from model_shards.kernels.quantized_latents import QuantizedRow
from model_shards.kv_cache import LatentKVCache
from model_shards.quantization import Quantization
from tests.played_amx import PlayedAmx
from tests.reference import CPU, make_hf_config, model_config_of, relative_error

SCALE = 0.07
LAYER = 1  # of two
KINDS = (None, *Quantization)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@functools.cache
def config_of(rank: int, rope: int) -> ModelConfig:
    return model_config_of(make_hf_config(kv_lora_rank=rank, qk_rope_head_dim=rope, num_hidden_layers=2))


def new_cache(
    blocks: int,
    block_size: int,
    rank: int,
    rope: int,
    quantization: Quantization | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> LatentKVCache:
    return LatentKVCache(config_of(rank, rope), blocks, block_size, dtype, CPU, quantization)


needs_instructions = pytest.mark.skipif(
    not can_decode(new_cache(1, 4, 16, 8)), reason="a CPU without AVX512_BF16 has no such code"
)


@pytest.fixture(params=[1, 3])
def threads(request, monkeypatch) -> int:
    monkeypatch.setattr(module, "_WORK_OF_A_TEAM", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def paged(
    lengths: list[int], block_size: int, rank: int, rope: int, quantization: Quantization | None
) -> tuple[LatentKVCache, torch.Tensor]:
    """A cache whose blocks lie anywhere, full of NaN past each context and in the other layer, and the tables."""
    blocks = [-(-length // block_size) for length in lengths]
    order = torch.randperm(sum(blocks) + 1, generator=torch.Generator().manual_seed(5))
    tables = torch.full((len(lengths), max(blocks) + 2), int(order[-1]))  # the last one is nobody's
    cache = new_cache(sum(blocks) + 1, block_size, rank, rope, quantization)
    cache.data.view(torch.uint8).fill_(0xFF)  # not a number, as a bfloat16 and as a scale
    first = 0
    for row, (length, count) in enumerate(zip(lengths, blocks, strict=True)):
        tables[row, :count] = order[first : first + count]
        first += count
        latents = random(length, rank + rope, seed=6 + row) * (1 + row)
        cache.write(LAYER, slots_of(tables[row], block_size)[:length], latents[:, :rank], latents[:, rank:])
    return cache, tables


def slots_of(table: torch.Tensor, block_size: int) -> torch.Tensor:
    return (table[:, None] * block_size + torch.arange(block_size)).flatten()


def exact(queries, cache, tables, lengths, wide: bool = False) -> torch.Tensor:
    """Of latents as bfloat16 holds them, or `wide`, as they are stored."""
    out = torch.empty(*queries.shape[:2], cache.rank, dtype=torch.float64)
    for row, length in enumerate(lengths):
        slots = slots_of(tables[row], cache.block_size)[:length]
        latents = (cache.read(LAYER, slots) if wide else cache.gather(LAYER, slots)).double()
        weights = (queries[row].double() @ latents.T * SCALE).softmax(-1)
        out[row] = weights @ latents[:, : cache.rank]
    return out


def attend(queries, cache, tables, lengths, scale: float = SCALE) -> torch.Tensor:
    """Of queries [D, N, R + O], of which the last elements lie in a tensor of other strides."""
    apart = torch.full((*queries.shape[:2], cache.rope + 6), 3.0, dtype=torch.bfloat16)
    apart[..., 6:] = queries[..., cache.rank :]
    latent = queries[..., : cache.rank].contiguous()
    return decode_attention(latent, apart[..., 6:], cache, LAYER, tables, torch.tensor(lengths), scale)


@functools.cache
def with_played_amx(rank: int, rope: int, kind: Quantization | None) -> TeamFunction:
    row = None if kind is None else QuantizedRow(rank, rope, kind)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode_amx, "Amx", PlayedAmx)
        return decode_amx.decode_amx(rank, rope, row)


@needs_instructions
@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 700), min_size=1, max_size=2),
    block_size=st.sampled_from([16, 48, 256]),
    heads=st.sampled_from([1, 5, 16, 20]),
    kind=st.sampled_from(KINDS),
)
def test_the_code_for_amx_computes_the_same_whatever_plays_its_registers(lengths, block_size, heads, kind) -> None:
    sizes = 128, 64
    block_size -= kind is not None  # those that are widened need no whole sixteens
    cache, tables = paged(lengths, block_size, *sizes, kind)
    queries = (random(len(lengths), heads, sum(sizes), seed=7) * torch.logspace(-1, 2, heads)[:, None]).bfloat16()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "decode_code", lambda cache: with_played_amx(*sizes, kind))
        mixed = attend(queries, cache, tables, lengths)
        assert relative_error(mixed, exact(queries, cache, tables, lengths)) < 4e-3
        cache.write(
            LAYER, slots_of(tables[-1], block_size)[:1], random(1, sizes[0]) * float("nan"), random(1, sizes[1])
        )
        spoiled = attend(queries, cache, tables, lengths)
    assert bool(spoiled[-1].isnan().all())
    assert torch.equal(spoiled[:-1], mixed[:-1])


@needs_instructions
@settings(max_examples=80, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 700), min_size=1, max_size=4),
    block_size=st.sampled_from([2, 4, 6, 16, 48, 100, 256]),
    heads=st.sampled_from([1, 4, 5, 16, 17, 20, 40]),
    sizes=st.sampled_from([(16, 8), (48, 32), (64, 32), (128, 64)]),  # the last two are sizes for AMX
    kind=st.sampled_from(KINDS),
)
def test_it_is_the_softmax_over_each_context_and_nothing_else(lengths, block_size, heads, sizes, kind) -> None:
    cache, tables = paged(lengths, block_size, *sizes, kind)
    # From scores that are all alike to ones where a single token has all the weight.
    queries = (random(len(lengths), heads, sum(sizes), seed=7) * torch.logspace(-1, 2, heads)[:, None]).bfloat16()
    mixed = attend(queries, cache, tables, lengths)
    assert mixed.shape == (len(lengths), heads, sizes[0])
    # Off by the roundings of probabilities and of the result to bfloat16, and by that of nothing else.
    assert relative_error(mixed, exact(queries, cache, tables, lengths)) < 4e-3


@needs_instructions
@pytest.mark.parametrize("kind", Quantization)
@pytest.mark.parametrize("block_size", [1, 5, 16, 255])
@pytest.mark.parametrize("length", [1, 255, 256, 257, 511, 513])
def test_widened_latents_may_lie_in_blocks_of_odd_sizes_and_end_in_any_chunk(length, block_size, kind) -> None:
    cache, tables = paged([length, 3], block_size, 32, 8, kind)
    queries = random(2, 5, 40, seed=7).bfloat16()
    mixed = attend(queries, cache, tables, [length, 3])
    assert relative_error(mixed, exact(queries, cache, tables, [length, 3])) < 4e-3
    # And the rounding of what is widened is one more of the same size.
    assert relative_error(mixed, exact(queries, cache, tables, [length, 3], wide=True)) < 6e-3


@needs_instructions
@pytest.mark.parametrize("kind", KINDS)
def test_amx_decodes_what_is_of_whole_registers(kind) -> None:
    chosen = choose_instructions(torch.bfloat16)
    has_amx = chosen is not None and chosen.amx
    # Those that are widened lie together, in whatever blocks they come.
    for block_size, rank, rope, fits in ((16, 512, 64, True), (4, 512, 64, kind is not None), (16, 48, 32, False)):
        cache = new_cache(1, block_size, rank, rope, kind)
        is_of_vectors = decode_code(cache) is module._with_vectors(cache.rank, module.quantized_row(cache))
        assert is_of_vectors is not (has_amx and fits)


@needs_instructions
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rank", "rope"), [(32, 8), (64, 32)])
def test_threads_share_the_sequences_and_none_depends_on_another(threads, rank, rope, kind) -> None:
    lengths = [300, 1, 17, 600, 16]
    cache, tables = paged(lengths, 16, rank, rope, kind)
    queries = random(5, 20, rank + rope, seed=7).bfloat16()
    mixed = attend(queries, cache, tables, lengths)
    assert relative_error(mixed, exact(queries, cache, tables, lengths)) < 4e-3
    alone = attend(queries[3:4], cache, tables[3:4], lengths[3:4])
    assert torch.equal(alone[0], mixed[3])
    spoiled_slot = torch.tensor([int(tables[2, 0]) * 16 + 5])
    latent = random(1, rank + rope)
    latent[0, 3] = float("nan")
    cache.write(LAYER, spoiled_slot, latent[:, :rank], latent[:, rank:])
    spoiled = attend(queries, cache, tables, lengths)
    assert bool(spoiled[2].isnan().all())
    others = [0, 1, 3, 4]
    assert torch.equal(spoiled[others], mixed[others])


@pytest.fixture
def many_threads(monkeypatch) -> Iterator[list[torch.Tensor]]:
    """Seven; yields the slots of calls, which are not numbers until a part is written there."""
    monkeypatch.setattr(module, "_WORK_OF_A_TEAM", 1)
    given: list[torch.Tensor] = []

    def new_slots(rank: int, threads: int) -> torch.Tensor:
        given.append(torch.full((threads, slot_floats(rank)), float("nan")))
        return given[-1]

    monkeypatch.setattr(module, "new_slots", new_slots)
    before = torch.get_num_threads()
    torch.set_num_threads(7)
    yield given
    torch.set_num_threads(before)


@needs_instructions
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("by_amx", [False, True], ids=["vectors", "amx"])
@pytest.mark.parametrize(
    ("lengths", "heads", "block_size", "parts"),
    [
        ([700], 16, 16, 7),
        ([700], 5, 16, 7),
        ([200], 16, 16, 3),  # no more than are worth it
        ([1], 16, 16, 0),
        ([700], 16, 256, 3),  # no more than blocks
        ([513], 20, 16, 6),  # of two tiles of heads
        ([300, 100, 600], 16, 48, 4),  # two each, but for the one that is too short
        ([300] * 4, 16, 16, 0),  # a piece for more than half of the threads
    ],
)
def test_threads_without_a_piece_take_parts_of_contexts(
    many_threads, lengths, heads, block_size, parts, by_amx, kind
) -> None:
    sizes = 128, 64
    cache, tables = paged(lengths, block_size, *sizes, kind)
    queries = (random(len(lengths), heads, sum(sizes), seed=7) * torch.logspace(-1, 2, heads)[:, None]).bfloat16()
    with pytest.MonkeyPatch.context() as patch:
        if by_amx:
            patch.setattr(module, "decode_code", lambda cache: with_played_amx(*sizes, kind))
        mixed = attend(queries, cache, tables, lengths)
        assert relative_error(mixed, exact(queries, cache, tables, lengths)) < 4e-3
        written = ~many_threads[0][:, 0].isnan()
        # A context that is whole leaves its slot as it was.
        assert int(written.sum()) == (parts)
        cache.write(LAYER, slots_of(tables[0], block_size)[:1], random(1, sizes[0]) * float("nan"), random(1, sizes[1]))
        spoiled = attend(queries, cache, tables, lengths)
    assert bool(spoiled[0].isnan().all())
    assert torch.equal(spoiled[1:], mixed[1:])


@needs_instructions
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rank", "rope", "block_size"), [(16, 8, 4), (64, 32, 16)])
def test_scores_of_any_size_leave_a_softmax(rank, rope, block_size, kind) -> None:
    cache = new_cache(1, block_size, rank, rope, kind)
    latents = torch.zeros(4, rank + rope)
    latents[:, rank] = torch.tensor([1.0, -1.0, 0.5, 1.0])
    latents[:, 1] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    cache.write(LAYER, torch.arange(4), latents[:, :rank], latents[:, rank:])
    queries = torch.zeros(1, 1, rank + rope, dtype=torch.bfloat16)
    queries[..., rank] = 1e20
    mixed = attend(queries, cache, torch.zeros(1, 1, dtype=torch.int64), [4], scale=1.0)
    assert mixed[0, 0, 1].item() == pytest.approx(2.5)  # of the two that score highest, alike


@pytest.mark.parametrize(
    "cache",
    [
        pytest.param(new_cache(1, 4, 16, 8, dtype=torch.float32), id="float32"),
        pytest.param(new_cache(1, 4, 16, 8, Quantization.INT8, torch.float32), id="of a float32 model"),
        pytest.param(new_cache(1, 5, 16, 8), id="odd blocks"),
        pytest.param(new_cache(1, 4, 20, 8), id="rank"),
        pytest.param(new_cache(1, 4, 20, 8, Quantization.FP8), id="rank, widened"),
        pytest.param(new_cache(1, 258, 16, 8), id="large blocks"),
        pytest.param(new_cache(1, 257, 16, 8, Quantization.FP8), id="large blocks, widened"),
    ],
)
def test_what_it_does_not_serve_is_told(cache) -> None:
    assert not can_decode(cache)
