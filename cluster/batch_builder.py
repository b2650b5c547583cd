"""From scheduled chunks to the tensors of one micro-batch.

Shapes: T tokens, S sequences, B blocks in the longest block table, R rows of logits wanted.

All integers of a micro-batch are laid end to end in one buffer and cross to the device in one copy:

    [ token_ids T | positions T | slot_mapping T | logits_indices R | block_tables S x B ]
"""

from array import array
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from itertools import accumulate

import torch

from cluster.scheduler import ScheduledChunk
from model_shards.batch import AttentionBatch


@dataclass(frozen=True)
class BatchLayout:
    """A micro-batch in host memory, before its one copy to the device."""

    buffer: "array[int]"
    cu_seqlens_q: tuple[int, ...]
    context_lens: tuple[int, ...]
    num_decodes: int
    num_logits: int  # R
    width: int  # B

    def fill_in(self, token_ids: Iterable[int]) -> None:
        """Writes all T token ids; must come before `batch`."""
        self.buffer[: self.cu_seqlens_q[-1]] = array("q", token_ids)

    def batch(self, device: torch.device) -> AttentionBatch:
        """The tensors; on a CPU they are the buffer itself."""
        num_tokens, num_sequences = self.cu_seqlens_q[-1], len(self.context_lens)
        sizes = [num_tokens, num_tokens, num_tokens, self.num_logits, num_sequences * self.width]
        # The tensor keeps the buffer alive; an empty buffer cannot be shared.
        flat = torch.frombuffer(self.buffer, dtype=torch.int64) if self.buffer else torch.empty(0, dtype=torch.int64)
        token_ids, positions, slot_mapping, logits, block_tables = torch.split(flat.to(device), sizes)
        return AttentionBatch(
            token_ids=token_ids,
            positions=positions,
            slot_mapping=slot_mapping,
            cu_seqlens_q=self.cu_seqlens_q,
            context_lens=self.context_lens,
            block_tables=block_tables.view(num_sequences, self.width),
            num_decodes=self.num_decodes,
            logits_indices=logits,
        )


def build_batch(chunks: SequenceOf[ScheduledChunk], block_size: int, device: torch.device) -> AttentionBatch:
    """The micro-batch of `chunks`, decodes first; none gives T = 0. Every chunk's blocks must be allocated."""
    return lay_out(chunks, [chunk.sequence.block_table for chunk in chunks], block_size).batch(device)


def lay_out(chunks: SequenceOf[ScheduledChunk], block_tables: "SequenceOf[array[int]]", block_size: int) -> BatchLayout:
    """`chunks`, with the block table of each.

    Where the sequences do not have their tokens yet, none of them, `BatchLayout.fill_in` must bring the ids.
    """
    num_tokens = sum(chunk.num_tokens for chunk in chunks)
    cu_seqlens_q = tuple(accumulate((chunk.num_tokens for chunk in chunks), initial=0))
    width = max(map(len, block_tables), default=0)
    logits_indices = [cu_seqlens_q[index + 1] - 1 for index, chunk in enumerate(chunks) if chunk.wants_logits]

    buffer = array("q")
    for chunk in chunks:
        buffer.extend(chunk.sequence.token_ids[chunk.start : chunk.stop])
    buffer.frombytes(bytes(buffer.itemsize * (num_tokens - len(buffer))))
    for chunk in chunks:
        buffer.extend(range(chunk.start, chunk.stop))
    for chunk, table in zip(chunks, block_tables, strict=True):
        _extend_slots(buffer, chunk, table, block_size)
    buffer.extend(logits_indices)
    for table in block_tables:
        buffer.extend(table)
        buffer.frombytes(bytes(buffer.itemsize * (width - len(table))))
    return BatchLayout(
        buffer,
        cu_seqlens_q,
        context_lens=tuple(chunk.stop for chunk in chunks),
        num_decodes=sum(chunk.is_decode for chunk in chunks),
        num_logits=len(logits_indices),
        width=width,
    )


def _extend_slots(buffer: "array[int]", chunk: ScheduledChunk, table: "array[int]", block_size: int) -> None:
    """Appends the chunk's slots, one run of neighbours per block."""
    position = chunk.start
    while position < chunk.stop:
        block, offset = divmod(position, block_size)
        run = min(chunk.stop - position, block_size - offset)
        first = table[block] * block_size + offset
        buffer.extend(range(first, first + run))
        position += run
