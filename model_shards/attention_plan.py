"""Where the attention of one micro-batch reads: computed once per step, used by every layer.

Shapes: T tokens, D decodes in a group, L longest context of a group, C context and Q new tokens of one prefill.
"""

from dataclasses import dataclass

import torch

from model_shards.batch import AttentionBatch

# Padding of a decode group may reach its own size again, or this many rows, whichever is more: enough for one
# group in the usual batch, and a single long context never makes short ones as long as itself.
_PADDED_ROWS_TOLERATED = 16_384
# Rows gathered at once by one group (150 MB in bf16 with 576 elements a row); one longer context stands alone.
_GATHERED_ROWS_LIMIT = 131_072


@dataclass(frozen=True)
class DecodeGroup:
    """Decodes of similar context length, attended to together."""

    rows: torch.Tensor  # [D] int64, tokens of the micro-batch
    slots: torch.Tensor  # [D, L] int64; past the context the sequence's own last slot is repeated
    padding: torch.Tensor  # [D, L] bool, True past the context


@dataclass(frozen=True)
class PrefillSpan:
    """One prefill chunk: tokens [start, stop) of the micro-batch, the last Q of C context tokens."""

    start: int
    stop: int
    slots: torch.Tensor  # [C] int64
    visible: torch.Tensor | None  # [Q, C] bool; None when the chunk is the whole context (plain causal)


@dataclass(frozen=True)
class AttentionPlan:
    """Decodes in groups, prefills one by one."""

    decodes: tuple[DecodeGroup, ...]
    prefills: tuple[PrefillSpan, ...]


def plan_attention(batch: AttentionBatch, block_size: int) -> AttentionPlan:
    """Turns block tables into slots; copies a few small index tensors to the device."""
    decodes = tuple(
        _decode_group(batch, group, block_size) for group in group_by_length(batch.context_lens[: batch.num_decodes])
    )
    prefills = tuple(
        _prefill_span(batch, sequence, block_size) for sequence in range(batch.num_decodes, len(batch.context_lens))
    )
    return AttentionPlan(decodes, prefills)


def group_by_length(lengths: tuple[int, ...]) -> list[list[int]]:
    """Cuts indices, shortest first, into groups whose padding is bounded; each index is in exactly one group."""
    groups: list[list[int]] = []
    total = 0
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        length = lengths[index]
        padded = (len(groups[-1]) + 1) * length if groups else 0
        tolerated = min(max(2 * (total + length), _PADDED_ROWS_TOLERATED), _GATHERED_ROWS_LIMIT)
        if groups and padded <= tolerated:
            groups[-1].append(index)
            total += length
        else:
            groups.append([index])
            total = length
    return groups


def _decode_group(batch: AttentionBatch, sequences: list[int], block_size: int) -> DecodeGroup:
    device = batch.block_tables.device
    rows = torch.tensor(sequences, dtype=torch.int64, device=device)  # decode i is token i
    lengths = torch.tensor([batch.context_lens[i] for i in sequences], dtype=torch.int64, device=device)[:, None]
    positions = torch.arange(max(batch.context_lens[i] for i in sequences), device=device)[None]  # [1, L]
    # Repeating the own last slot keeps other sequences' values (block 0 of the padded table) out of reach.
    own = torch.minimum(positions, lengths - 1)  # [D, L]
    blocks = batch.block_tables[rows].gather(1, own // block_size)
    return DecodeGroup(rows, blocks * block_size + own % block_size, positions >= lengths)


def _prefill_span(batch: AttentionBatch, sequence: int, block_size: int) -> PrefillSpan:
    device = batch.block_tables.device
    start, stop = batch.cu_seqlens_q[sequence], batch.cu_seqlens_q[sequence + 1]
    context = batch.context_lens[sequence]
    positions = torch.arange(context, device=device)  # [C]
    slots = batch.block_tables[sequence][positions // block_size] * block_size + positions % block_size
    visible = None
    if stop - start < context:
        visible = positions[None] <= positions[context - (stop - start) :, None]
    return PrefillSpan(start, stop, slots, visible)
