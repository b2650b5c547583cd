"""The next step, laid out while the rows of this one are away at the experts.

    step t      schedule   agree   run [ dispatch  PREPARE t + 1  combine ... sample ]   commit
    step t + 1  TAKE, FILL IN   agree   run ...

What is prepared is the usual case: every running sequence decodes, those that end by their length are gone, and
nobody is admitted or preempted. Nothing is decided and nothing taken with it, blocks neither: a step that turns out
otherwise (a sequence ended by its token, failed, was cancelled, may be admitted; the step before was lost) is dropped
without a trace, and one that is taken is the step that `Scheduler.schedule` would have given, to the block.
"""

from dataclasses import dataclass

import torch

from cluster.batch_builder import BatchLayout, lay_out
from cluster.scheduler import ForeseenChunks, ScheduledChunk, Scheduler, split_micro_batches
from cluster.sequence import Sequence
from model_shards.batch import AttentionBatch


@dataclass(frozen=True)
class PreparedStep:
    """A step of decodes but for the tokens that the step before it samples."""

    foreseen: ForeseenChunks
    micro_batches: tuple[tuple[ScheduledChunk, ...], ...]  # none of them empty
    layouts: tuple[BatchLayout, ...]  # of the micro-batches
    sampled: tuple[Sequence, ...]  # micro-batch by micro-batch

    def batches(self, device: torch.device) -> tuple[AttentionBatch, ...]:
        """With the last token of every sequence filled in; the step must have been taken (`Scheduler.take`)."""
        for chunks, layout in zip(self.micro_batches, self.layouts, strict=True):
            layout.fill_in(chunk.sequence.token_ids[-1] for chunk in chunks)
        return tuple(layout.batch(device) for layout in self.layouts)


def prepare_step(
    scheduler: Scheduler, under_way: tuple[ScheduledChunk, ...], count: int, block_size: int
) -> PreparedStep | None:
    """The step behind `under_way` in `count` micro-batches, or one for each sequence; None where it is not foreseen."""
    foreseen = scheduler.foresee(under_way)
    if foreseen is None:
        return None
    micro_batches = split_micro_batches(foreseen.chunks, min(count, len(foreseen.chunks)))
    layouts = tuple(
        lay_out(chunks, [foreseen.block_table(chunk.sequence) for chunk in chunks], block_size)
        for chunks in micro_batches
    )
    sampled = tuple(chunk.sequence for chunks in micro_batches for chunk in chunks)
    return PreparedStep(foreseen, micro_batches, layouts, sampled)
