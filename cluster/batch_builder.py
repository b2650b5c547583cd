"""From scheduled chunks to the tensors of one micro-batch.

Shapes: T tokens, S sequences, B blocks in the longest block table, R rows of logits wanted.

All integers of a micro-batch are laid end to end in one buffer and cross to the device in one copy:

    [ token_ids T | positions T | slot_mapping T | logits_indices R | block_tables S x B ]
"""

from array import array
from collections.abc import Sequence as SequenceOf
from itertools import accumulate

import torch

from cluster.scheduler import ScheduledChunk
from model_shards.batch import AttentionBatch


def build_batch(chunks: SequenceOf[ScheduledChunk], block_size: int, device: torch.device) -> AttentionBatch:
    """The micro-batch of `chunks`, decodes first; none gives T = 0. Every chunk's blocks must be allocated."""
    num_tokens = sum(chunk.num_tokens for chunk in chunks)
    cu_seqlens_q = tuple(accumulate((chunk.num_tokens for chunk in chunks), initial=0))
    width = max((len(chunk.sequence.block_table) for chunk in chunks), default=0)
    logits_indices = [cu_seqlens_q[index + 1] - 1 for index, chunk in enumerate(chunks) if chunk.wants_logits]

    buffer = array("q")
    for chunk in chunks:
        buffer.extend(chunk.sequence.token_ids[chunk.start : chunk.stop])
    for chunk in chunks:
        buffer.extend(range(chunk.start, chunk.stop))
    for chunk in chunks:
        _extend_slots(buffer, chunk, block_size)
    buffer.extend(logits_indices)
    for chunk in chunks:
        table = chunk.sequence.block_table
        buffer.extend(table)
        buffer.frombytes(bytes(buffer.itemsize * (width - len(table))))

    sizes = [num_tokens, num_tokens, num_tokens, len(logits_indices), len(chunks) * width]
    # The tensor keeps the buffer alive; an empty buffer cannot be shared.
    flat = torch.frombuffer(buffer, dtype=torch.int64) if buffer else torch.empty(0, dtype=torch.int64)
    token_ids, positions, slot_mapping, logits, block_tables = torch.split(flat.to(device), sizes)
    return AttentionBatch(
        token_ids=token_ids,
        positions=positions,
        slot_mapping=slot_mapping,
        cu_seqlens_q=cu_seqlens_q,
        context_lens=tuple(chunk.stop for chunk in chunks),
        block_tables=block_tables.view(len(chunks), width),
        num_decodes=sum(chunk.is_decode for chunk in chunks),
        logits_indices=logits,
    )


def _extend_slots(buffer: "array[int]", chunk: ScheduledChunk, block_size: int) -> None:
    """Appends the chunk's slots, one run of neighbours per block."""
    position = chunk.start
    while position < chunk.stop:
        block, offset = divmod(position, block_size)
        run = min(chunk.stop - position, block_size - offset)
        first = chunk.sequence.block_table[block] * block_size + offset
        buffer.extend(range(first, first + run))
        position += run
