"""Attention of decodes to a paged cache of a bfloat16 model, for all sequences in one call.

Shapes: D decodes, N heads, R kv_lora_rank, O qk_rope_head_dim.

Latents in bfloat16 are read where they lie. Those in one byte an element are widened to bfloat16, some at a time that
stay in the second-level cache until they are read.
"""

import ctypes
import functools

import torch

from model_shards.kernels import decode_amx
from model_shards.kernels.decode_ir import CHUNK_TOKENS, INSTRUCTIONS, MAX_BLOCK_SIZE
from model_shards.kernels.decode_parts import ARGUMENTS, HEADS, slot_floats
from model_shards.kernels.decode_vectors import decode_vectors
from model_shards.kernels.instructions import Instructions, choose_instructions
from model_shards.kernels.machine_code import TeamFunction
from model_shards.kernels.program import Call, float_bits
from model_shards.kernels.quantized_latents import QuantizedRow
from model_shards.kv_cache import LatentKVCache

# Multiplications worth a team of threads: some 40 us of one.
_WORK_OF_A_TEAM = 2**21


def can_decode(kv_cache: LatentKVCache) -> bool:
    """Whether `decode_attention` serves this cache on this machine."""
    if kv_cache.data.device.type != "cpu" or kv_cache.dtype is not torch.bfloat16 or _instructions() is None:
        return False
    # Two tokens are multiplied at once, which must lie together; those that are widened do.
    pairs = kv_cache.quantization is not None or kv_cache.block_size % 2 == 0
    return pairs and kv_cache.block_size <= MAX_BLOCK_SIZE and kv_cache.rope % 2 == 0 and kv_cache.rank % HEADS == 0


def decode_attention(
    latent_queries: torch.Tensor,  # [D, N, R] bfloat16
    rope_queries: torch.Tensor,  # [D, N, O] bfloat16, whose rows may lie apart
    kv_cache: LatentKVCache,
    layer: int,
    block_tables: torch.Tensor,  # [D, ...] int64
    lengths: torch.Tensor,  # [D] int64, of the contexts
    scale: float,
) -> torch.Tensor:
    """softmax(scale * q.c) c over the first R elements of each context's latents: [D, N, R] bfloat16.

    Probabilities, and latents that are widened, are rounded to bfloat16, too; all sums are float32.
    """
    assert latent_queries.is_contiguous(), "heads lie one after another"
    count, _, rank = latent_queries.shape
    mixed = torch.empty_like(latent_queries)
    number = ctypes.c_int64(count)
    work = int(lengths.sum()) * (rank + kv_cache.rope) * latent_queries.shape[1]
    threads = torch.get_num_threads() if work >= _WORK_OF_A_TEAM else 1
    slots = new_slots(rank, threads)
    call = Call(
        decode_code(kv_cache),
        ARGUMENTS,
        sequences=ctypes.addressof(number),
        latent_queries=latent_queries.data_ptr(),
        rope_queries=rope_queries.data_ptr(),
        rope_head=2 * rope_queries.stride(1),
        rope_sequence=2 * rope_queries.stride(0),
        mixed=mixed.data_ptr(),
        heads=latent_queries.shape[1],
        scale=float_bits(scale),
        slots=slots.data_ptr(),
        num_slots=threads,
        **cache_arguments(kv_cache, layer),
        **table_arguments(block_tables, lengths),
    )
    call.run(threads)
    return mixed


def new_slots(rank: int, threads: int) -> torch.Tensor:
    """Room for the parts of contexts that so many threads attend to."""
    return torch.empty(threads, slot_floats(rank))


def cache_arguments(kv_cache: LatentKVCache, layer: int) -> dict[str, int]:
    """Those that say where one layer of a cache lies."""
    rows = kv_cache.layer(layer)
    assert rows.is_contiguous(), "rows lie one after another"
    words = (kv_cache.rank + kv_cache.rope) // 2
    return {"cache": rows.data_ptr(), "words": words, "block_size": kv_cache.block_size}


def table_arguments(block_tables: torch.Tensor, lengths: torch.Tensor) -> dict[str, int]:
    """Those that say which rows of it a sequence has."""
    assert block_tables.stride(1) == 1, "blocks of a table lie one after another; tables may be the same one"
    assert lengths.is_contiguous(), "and lengths"
    return {
        "tables": block_tables.data_ptr(),
        "table_row": 8 * block_tables.stride(0),
        "lengths": lengths.data_ptr(),
    }


def quantized_row(kv_cache: LatentKVCache) -> QuantizedRow | None:
    """How the rows of a cache that `can_decode` takes are read and written; None: they are bfloat16."""
    if kv_cache.quantization is None:
        return None
    return QuantizedRow(kv_cache.rank, kv_cache.rope, kv_cache.quantization)


def decode_code(kv_cache: LatentKVCache) -> TeamFunction:
    """Of the calls whose arguments are `decode_parts.ARGUMENTS`, for a cache that `can_decode` takes."""
    chosen, row = _instructions(), quantized_row(kv_cache)
    # Latents that are widened lie together, whatever blocks they come from.
    together = kv_cache.block_size if row is None else CHUNK_TOKENS
    if chosen is not None and chosen.amx and decode_amx.serves(kv_cache.rank, kv_cache.rope, together):
        return _with_amx(kv_cache.rank, kv_cache.rope, row)
    return _with_vectors(kv_cache.rank, row)


@functools.cache
def _with_amx(rank: int, rope: int, row: QuantizedRow | None) -> TeamFunction:
    return decode_amx.decode_amx(rank, rope, row)


@functools.cache
def _with_vectors(rank: int, row: QuantizedRow | None) -> TeamFunction:
    return decode_vectors(rank, row)


@functools.cache
def _instructions() -> Instructions | None:
    """Those that there is code of decodes for. Asked in every layer of every step."""
    chosen = choose_instructions(torch.bfloat16)
    return None if chosen is None or chosen.arithmetic is not INSTRUCTIONS.arithmetic else chosen
