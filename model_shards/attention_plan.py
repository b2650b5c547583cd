"""Where the attention of one micro-batch reads: computed once per step, used by every layer.

Shapes: T tokens, D decodes in a group, L longest context of a group, C context and Q new tokens of one prefill.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch

from model_shards.batch import AttentionBatch


@dataclass(frozen=True)
class GroupLimits:
    """How far decodes are put together: padding of a group may reach its own size again, or `tolerated` rows, whichever
    is more, and never more than `gathered` rows in all; one longer context stands alone."""

    tolerated: int
    gathered: int


# Few large products: one group in the usual batch, and a single long context never makes short ones as long as itself.
# At most 150 MB in bf16 with 576 elements a row.
DEVICE_LIMITS = GroupLimits(tolerated=16_384, gathered=131_072)
# What stays in the second-level cache between the two products that read it (512 rows of 576 float32: 1.2 MB).
CPU_LIMITS = GroupLimits(tolerated=512, gathered=512)


@dataclass(frozen=True)
class DecodeGroup:
    """Decodes of similar context length, attended to together."""

    rows: torch.Tensor  # [D] int64, tokens of the micro-batch
    slots: torch.Tensor  # [D, L] int64; past the context the sequence's own last slot is repeated
    padding: torch.Tensor | None  # [D, L] bool, True past the context; None when all are as long
    run: int | None  # the first slot, when there is one sequence and its slots lie together


@dataclass(frozen=True)
class PrefillSpan:
    """One prefill chunk: tokens [start, stop) of the micro-batch, the last Q of C context tokens."""

    start: int
    stop: int
    slots: torch.Tensor  # [C] int64
    block_table: torch.Tensor  # [...] int64, the sequence's blocks

    @property
    def context(self) -> int:
        """C."""
        return int(self.slots.shape[0])

    @property
    def past(self) -> int:
        """C - Q, the tokens that were in the cache before."""
        return self.context - (self.stop - self.start)

    @cached_property
    def visible_lengths(self) -> torch.Tensor:
        """[Q] int64, what each new token attends to: all before it and itself."""
        return torch.arange(self.past + 1, self.context + 1)

    @cached_property
    def visible(self) -> torch.Tensor | None:
        """[Q, C] bool; None when the chunk is the whole context (plain causal). Made when first asked for, and kept."""
        if not self.past:
            return None
        positions = torch.arange(self.context, device=self.slots.device)
        return positions[None] <= positions[self.past :, None]


@dataclass(frozen=True)
class AttentionPlan:
    """Prefills one by one; decodes by their block tables, or in groups when these are asked for."""

    prefills: tuple[PrefillSpan, ...]
    num_decodes: int
    block_tables: torch.Tensor  # [D, ...] int64
    context_lens: tuple[int, ...]  # D
    block_size: int

    @cached_property
    def lengths(self) -> torch.Tensor:
        """`context_lens` as int64."""
        return torch.tensor(self.context_lens, dtype=torch.int64)

    @cached_property
    def decodes(self) -> tuple[DecodeGroup, ...]:
        """Decodes of similar length together."""
        limits = CPU_LIMITS if self.block_tables.device.type == "cpu" else DEVICE_LIMITS
        return tuple(
            _decode_group(self.block_tables, self.context_lens, group, self.block_size)
            for group in group_by_length(self.context_lens, limits)
        )

    @cached_property
    def decode_order(self) -> torch.Tensor | None:
        """[D] int64, the rows of all groups end to end; None when they are 0, 1, 2, ..."""
        if not self.decodes:
            return None
        order = torch.cat([group.rows for group in self.decodes])
        # Known without asking a device: groups are cut from the lengths in order.
        in_order = all(first <= second for first, second in pairwise(self.context_lens))
        return None if in_order else order


def plan_attention(batch: AttentionBatch, block_size: int) -> AttentionPlan:
    """Turns block tables into slots; copies a few small index tensors to the device."""
    prefills = tuple(
        _prefill_span(batch, sequence, block_size) for sequence in range(batch.num_decodes, len(batch.context_lens))
    )
    count = batch.num_decodes
    return AttentionPlan(prefills, count, batch.block_tables[:count], batch.context_lens[:count], block_size)


def group_by_length(lengths: tuple[int, ...], limits: GroupLimits) -> list[list[int]]:
    """Cuts indices, shortest first, into groups whose padding is bounded; each index is in exactly one group."""
    groups: list[list[int]] = []
    total = 0
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        length = lengths[index]
        padded = (len(groups[-1]) + 1) * length if groups else 0
        tolerated = min(max(2 * (total + length), limits.tolerated), limits.gathered)
        if groups and padded <= tolerated:
            groups[-1].append(index)
            total += length
        else:
            groups.append([index])
            total = length
    return groups


def _decode_group(
    block_tables: torch.Tensor, context_lens: tuple[int, ...], sequences: list[int], block_size: int
) -> DecodeGroup:
    device = block_tables.device
    rows = torch.tensor(sequences, dtype=torch.int64, device=device)  # decode i is token i
    contexts = [context_lens[i] for i in sequences]
    lengths = torch.tensor(contexts, dtype=torch.int64, device=device)[:, None]
    positions = torch.arange(max(contexts), device=device)[None]  # [1, L]
    # Repeating the own last slot keeps other sequences' values (block 0 of the padded table) out of reach.
    own = torch.minimum(positions, lengths - 1)  # [D, L]
    blocks = block_tables[rows].gather(1, own // block_size)
    slots = blocks * block_size + own % block_size
    padding = None if len(set(contexts)) == 1 else positions >= lengths
    return DecodeGroup(rows, slots, padding, _run_of(slots))


def _run_of(slots: torch.Tensor) -> int | None:
    """The first of `slots` [1, L] if each is the one before and one; only asked on a CPU, where it costs no sync."""
    if slots.shape[0] != 1 or slots.device.type != "cpu":
        return None
    first = int(slots[0, 0])
    together = int(slots[0, -1]) - first == slots.shape[1] - 1 and bool((slots[0].diff() == 1).all())
    return first if together else None


def _prefill_span(batch: AttentionBatch, sequence: int, block_size: int) -> PrefillSpan:
    device = batch.block_tables.device
    start, stop = batch.cu_seqlens_q[sequence], batch.cu_seqlens_q[sequence + 1]
    positions = torch.arange(batch.context_lens[sequence], device=device)  # [C]
    slots = batch.block_tables[sequence][positions // block_size] * block_size + positions % block_size
    return PrefillSpan(start, stop, slots, batch.block_tables[sequence])
