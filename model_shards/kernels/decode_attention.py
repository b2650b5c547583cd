"""Attention of decodes to a paged cache of bfloat16 latents, read where they lie, for all sequences in one call.

Shapes: D decodes, N heads, R kv_lora_rank, O qk_rope_head_dim, B blocks of the cache.
"""

import ctypes
import functools

import torch

from model_shards.kernels import decode_amx
from model_shards.kernels.decode_ir import ARGUMENTS, HEADS, INSTRUCTIONS, MAX_BLOCK_SIZE, decode_ir
from model_shards.kernels.instructions import Instructions, choose_instructions
from model_shards.kernels.machine_code import TeamFunction
from model_shards.kernels.program import Call, float_bits

# Multiplications worth a team of threads: some 40 us of one.
_WORK_OF_A_TEAM = 2**21


def can_decode(cache: torch.Tensor, rank: int) -> bool:
    """Whether `decode_attention` serves this layer of a cache, [B, block_size, R + O], on this machine."""
    if cache.device.type != "cpu" or cache.dtype is not torch.bfloat16 or _instructions() is None:
        return False
    block_size, width = cache.shape[1:]
    return block_size % 2 == 0 and block_size <= MAX_BLOCK_SIZE and width % 2 == 0 and rank % HEADS == 0


def decode_attention(
    latent_queries: torch.Tensor,  # [D, N, R] bfloat16
    rope_queries: torch.Tensor,  # [D, N, O] bfloat16, whose rows may lie apart
    cache: torch.Tensor,  # [B, block_size, R + O] bfloat16
    block_tables: torch.Tensor,  # [D, ...] int64
    lengths: torch.Tensor,  # [D] int64, of the contexts
    scale: float,
) -> torch.Tensor:
    """softmax(scale * q.c) c over the first R elements of each context's latents: [D, N, R] bfloat16.

    Probabilities are rounded to bfloat16, too; all sums are float32.
    """
    assert latent_queries.is_contiguous(), "heads lie one after another"
    count, _, rank = latent_queries.shape
    mixed = torch.empty_like(latent_queries)
    number = ctypes.c_int64(count)
    call = Call(
        decode_code(cache, rank),
        ARGUMENTS,
        sequences=ctypes.addressof(number),
        latent_queries=latent_queries.data_ptr(),
        rope_queries=rope_queries.data_ptr(),
        rope_head=2 * rope_queries.stride(1),
        rope_sequence=2 * rope_queries.stride(0),
        mixed=mixed.data_ptr(),
        rank=rank,
        heads=latent_queries.shape[1],
        scale=float_bits(scale),
        **cache_arguments(cache),
        **table_arguments(block_tables, lengths),
    )
    work = int(lengths.sum()) * cache.shape[2] * latent_queries.shape[1]
    call.run(torch.get_num_threads() if work >= _WORK_OF_A_TEAM else 1)
    return mixed


def cache_arguments(cache: torch.Tensor) -> dict[str, int]:
    """Those that say where one layer of a cache lies."""
    assert cache.is_contiguous(), "rows lie one after another"
    return {"cache": cache.data_ptr(), "words": cache.shape[2] // 2, "block_size": cache.shape[1]}


def table_arguments(block_tables: torch.Tensor, lengths: torch.Tensor) -> dict[str, int]:
    """Those that say which rows of it a sequence has."""
    assert block_tables.stride(1) == 1, "blocks of a table lie one after another; tables may be the same one"
    assert lengths.is_contiguous(), "and lengths"
    return {
        "tables": block_tables.data_ptr(),
        "table_row": 8 * block_tables.stride(0),
        "lengths": lengths.data_ptr(),
    }


def decode_code(cache: torch.Tensor, rank: int) -> TeamFunction:
    """Of the calls whose arguments are `decode_ir.ARGUMENTS`, for a layer of a cache that `can_decode` takes."""
    block_size, width = cache.shape[1:]
    chosen = _instructions()
    if chosen is not None and chosen.amx and decode_amx.serves(rank, width - rank, block_size):
        return _with_amx(rank, width - rank)
    return _with_vectors()


@functools.cache
def _with_amx(rank: int, rope: int) -> TeamFunction:
    return decode_amx.decode_amx(rank, rope)


@functools.cache
def _with_vectors() -> TeamFunction:
    return TeamFunction(decode_ir())


@functools.cache
def _instructions() -> Instructions | None:
    """Those that there is code of decodes for. Asked in every layer of every step."""
    chosen = choose_instructions(torch.bfloat16)
    return None if chosen is None or chosen.arithmetic is not INSTRUCTIONS.arithmetic else chosen
