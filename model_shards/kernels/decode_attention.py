"""Attention of decodes to a paged cache of bfloat16 latents, read where they lie, for all sequences in one call.

Shapes: D decodes, N heads, R kv_lora_rank, O qk_rope_head_dim, B blocks of the cache.
"""

import ctypes
import functools
import struct

import torch

from model_shards.kernels.decode_ir import ARGUMENTS, HEADS, INSTRUCTIONS, MAX_BLOCK_SIZE, decode_ir
from model_shards.kernels.instructions import choose_instructions
from model_shards.kernels.machine_code import TeamFunction

# Multiplications worth a team of threads: some 40 us of one.
_WORK_OF_A_TEAM = 2**21


def can_decode(cache: torch.Tensor, rank: int) -> bool:
    """Whether `decode_attention` serves this layer of a cache, [B, block_size, R + O], on this machine."""
    if cache.device.type != "cpu" or cache.dtype is not torch.bfloat16 or not _has_instructions():
        return False
    return cache.shape[1] <= MAX_BLOCK_SIZE and cache.shape[2] % 2 == 0 and rank % HEADS == 0


def decode_attention(
    queries: torch.Tensor,  # [N, D, R + O] float32
    cache: torch.Tensor,  # [B, block_size, R + O] bfloat16
    block_tables: torch.Tensor,  # [D, ...] int64
    lengths: torch.Tensor,  # [D] int64, of the contexts
    rank: int,
    scale: float,
) -> torch.Tensor:
    """softmax(scale * q.c) c over the first R elements of each context's latents: [N, D, R] float32.

    Queries are rounded to bfloat16; all that follows is float32.
    """
    heads, count, width = queries.shape
    tiles = -(-heads // HEADS)
    padded = tiles * HEADS
    words = torch.zeros if padded != heads else torch.empty
    # [D, tiles, words, HEADS]: a word of two elements as one number
    packed = words(count, tiles, width // 2, HEADS, dtype=torch.int32)
    by_sequence = queries.to(torch.bfloat16).view(torch.int32).permute(1, 2, 0)  # [D, words, N]
    for first in range(0, heads, HEADS):
        part = by_sequence[..., first : first + HEADS]
        packed[:, first // HEADS, :, : part.shape[2]] = part
    assert cache.is_contiguous(), "rows lie one after another"
    assert block_tables.stride(1) == 1, "so do the blocks of a table; tables may be the same one"
    assert lengths.is_contiguous(), "and lengths"
    mixed = torch.empty(padded, count, rank)
    arguments = (ctypes.c_int64 * len(ARGUMENTS))(
        packed.data_ptr(),
        cache.data_ptr(),
        width // 2,
        cache.shape[1],
        block_tables.data_ptr(),
        8 * block_tables.stride(0),
        lengths.data_ptr(),
        mixed.data_ptr(),
        rank,
        count,
        tiles,
        struct.unpack("i", struct.pack("f", scale))[0],
    )
    work = int(lengths.sum()) * width * padded
    _code().run(arguments, torch.get_num_threads() if work >= _WORK_OF_A_TEAM else 1)
    return mixed[:heads]


@functools.cache
def _has_instructions() -> bool:
    """Asked in every layer of every step."""
    chosen = choose_instructions(torch.bfloat16)
    return chosen is not None and chosen.arithmetic is INSTRUCTIONS.arithmetic


@functools.cache
def _code() -> TeamFunction:
    return TeamFunction(decode_ir())
