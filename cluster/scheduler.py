"""Which tokens the next step computes. Policy: no torch, no clock.

First come, first served. A step holds one token of every decoding sequence, then chunks of prefills up to the token
budget, oldest first, then newly admitted prefills. A sequence is admitted with the blocks that the prefix cache knows
of it and starts behind them. When blocks run out the newest running sequence gives its blocks back and waits at the
head of the queue; what has been evicted by then of its prompt and output is computed again later.

Why nothing starves: `running` is in the order of arrival and its members are all older than those that wait. The
oldest sequence is therefore the last to be preempted, fits into the cache alone (checked at the door), and finds at
least one token of budget, since decodes number at most max_num_seqs <= max_num_batched_tokens, itself included; where
what may stand beside them is nothing (`cluster.prefill_budget`), it soon is not.
"""

from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace

from cluster.block_manager import BlockManager
from cluster.limits import EngineLimits
from cluster.sequence import Sequence, SequenceStatus


@dataclass(frozen=True)
class ScheduledChunk:
    """Tokens [start, stop) of one sequence."""

    sequence: Sequence
    start: int
    stop: int
    is_decode: bool
    wants_logits: bool  # the chunk ends at the sequence's last token: the next one is sampled from it

    @property
    def num_tokens(self) -> int:
        """At least 1."""
        return self.stop - self.start


@dataclass(frozen=True)
class ForeseenChunks:
    """The chunks of a step of decodes, while the step before it is not committed: their tokens are not known yet."""

    chunks: tuple[ScheduledChunk, ...]
    blocks: Mapping[Sequence, int]  # who will need one more and which that will be, in the order of taking; not taken

    def block_table(self, sequence: Sequence) -> "array[int]":
        """That of the sequence when the step is scheduled."""
        block = self.blocks.get(sequence)
        return sequence.block_table if block is None else sequence.block_table + array("q", [block])


class Scheduler:
    """Owns the queues and, through the block manager, the blocks."""

    def __init__(self, limits: EngineLimits) -> None:
        self._limits = limits
        self._blocks = BlockManager(limits)
        # Ordered sets: whoever ends or is cancelled is found without searching. A plain dict from whose begin much was
        # taken searches for its first member.
        self._waiting: OrderedDict[Sequence, None] = OrderedDict()  # next to be admitted first
        self._running: dict[Sequence, None] = {}  # oldest first
        self._num_preemptions = 0
        self._num_cached_tokens = 0

    @property
    def num_waiting(self) -> int:
        """Sequences without blocks."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences with blocks."""
        return len(self._running)

    @property
    def has_prefill(self) -> bool:
        """Whether a sequence waits, or runs and has prompt tokens to compute."""
        return bool(self._waiting) or any(not sequence.is_decoding for sequence in self._running)

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no sequence holds."""
        return self._blocks.num_free_blocks

    @property
    def num_preemptions(self) -> int:
        """Preemptions since the start."""
        return self._num_preemptions

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens known to the prefix cache when their sequence was first admitted, since the start."""
        return self._num_cached_tokens

    def add(self, sequence: Sequence) -> None:
        """Puts a new sequence at the end of the queue; the caller has checked that it fits."""
        self._waiting[sequence] = None

    def remove(self, sequence: Sequence) -> None:
        """Ends a sequence and frees its blocks; must not be called while a step that reads them is under way."""
        if sequence.status is SequenceStatus.RUNNING:
            del self._running[sequence]
        elif sequence.status is SequenceStatus.WAITING:
            del self._waiting[sequence]
        self._blocks.free(sequence)
        sequence.status = SequenceStatus.ENDED

    def schedule(self, most_beside: Callable[[int], int | None] | None = None) -> tuple[ScheduledChunk, ...]:
        """The next step's chunks, decodes first. Computes nothing: calling it again gives the same tokens and slots.

        `most_beside` is told the number of decodes and says how many prefill tokens may stand beside them, None for no
        bound.

        Allocates blocks and may preempt; neither is undone when the step is abandoned.
        """
        self._make_room()
        chunks = [_chunk(sequence, 1) for sequence in self._running if sequence.is_decoding]
        budget = self._limits.max_num_batched_tokens - len(chunks)
        beside = None if most_beside is None else most_beside(len(chunks))
        if beside is not None:
            budget = min(budget, beside)
        for sequence in self._running:
            if budget > 0 and not sequence.is_decoding:
                chunks.append(_chunk(sequence, budget))
                budget -= chunks[-1].num_tokens
        while budget > 0 and (admitted := self._admit()) is not None:
            chunks.append(_chunk(admitted, budget))
            budget -= chunks[-1].num_tokens
        # A sequence that is admitted with all but one token known decodes from the start.
        return tuple(sorted(chunks, key=lambda chunk: not chunk.is_decode))

    def foresee(self, chunks: SequenceOf[ScheduledChunk]) -> ForeseenChunks | None:
        """What `schedule` gives once its last `chunks` are committed, if none comes, and none ends but by its length.

        None unless all that run decode then and nothing is to be decided: whom to admit, whom to preempt. Changes
        nothing.
        """
        if sum(chunk.wants_logits for chunk in chunks) < len(self._running):
            return None
        decodes = tuple(
            ScheduledChunk(sequence, sequence.num_tokens, sequence.num_tokens + 1, is_decode=True, wants_logits=True)
            for sequence in self._running
            if not sequence.ends_with_next
        )
        if not decodes or self._may_admit(len(decodes)):
            return None
        short = [
            chunk.sequence for chunk in decodes if self._limits.blocks_for(chunk.stop) > len(chunk.sequence.block_table)
        ]
        blocks = self._blocks.next_free(len(short))
        return ForeseenChunks(decodes, dict(zip(short, blocks, strict=True))) if len(blocks) == len(short) else None

    def take(self, foreseen: ForeseenChunks) -> bool:
        """Stands for `schedule` where that would give just the foreseen chunks and blocks; else changes nothing.

        Whether it does. `foreseen` must be newer than the last `schedule`.
        """
        as_foreseen = (
            len(self._running) == len(foreseen.chunks)
            and not self._may_admit(len(self._running))
            and all(
                chunk.sequence is sequence
                and chunk.start == sequence.num_computed_tokens
                and chunk.stop == sequence.num_tokens
                for chunk, sequence in zip(foreseen.chunks, self._running, strict=True)
            )
            and self._blocks.next_free(len(foreseen.blocks)) == list(foreseen.blocks.values())
        )
        if as_foreseen:
            for sequence in foreseen.blocks:
                self._blocks.append(sequence)
        return as_foreseen

    def commit(self, chunks: Iterable[ScheduledChunk]) -> None:
        """The tokens of `chunks` are in the cache for good; full blocks of them become known."""
        for chunk in chunks:
            chunk.sequence.num_computed_tokens = chunk.stop
            self._blocks.publish(chunk.sequence, chunk.start, chunk.stop)

    def forget(self, sequence: Sequence) -> None:
        """Nobody takes a block from this running sequence any more: what it computed is in doubt."""
        self._blocks.forget(sequence)

    def check_integrity(self) -> None:
        """Raises AssertionError when queues, blocks and sequences contradict each other."""
        for sequence in self._waiting:
            assert sequence.status is SequenceStatus.WAITING
            assert not sequence.block_table
            assert sequence.num_computed_tokens == 0
        for sequence in self._running:
            assert sequence.status is SequenceStatus.RUNNING
            assert 0 <= sequence.num_computed_tokens < sequence.num_tokens
            assert self._limits.blocks_for(sequence.num_computed_tokens) <= len(sequence.block_table)
        assert len(self._running) <= self._limits.max_num_seqs
        self._blocks.check_integrity([*self._waiting, *self._running])

    def _make_room(self) -> None:
        """Gives every running sequence, oldest first, the blocks of all its tokens; preempts the newest for them.

        What was preempted is not admitted again in the same step, nor anyone behind it, unless others hold its prefix:
        it needs at least the blocks it gave, and some of these went to an older one.
        """
        for sequence in tuple(self._running):
            while sequence in self._running and not self._blocks.can_append(sequence):
                self._preempt_newest()
            if sequence not in self._running:
                return  # it was the newest, so none is left behind it
            self._blocks.append(sequence)

    def _preempt_newest(self) -> None:
        sequence, _ = self._running.popitem()
        self._blocks.free(sequence)
        sequence.num_computed_tokens = 0
        sequence.status = SequenceStatus.WAITING
        self._waiting[sequence] = None
        self._waiting.move_to_end(sequence, last=False)
        self._num_preemptions += 1

    def _may_admit(self, num_running: int) -> bool:
        """Whether a sequence waits, and might run beside so many."""
        return bool(self._waiting) and num_running < self._limits.max_num_seqs

    def _admit(self) -> Sequence | None:
        """Lets the first waiting sequence run if all its tokens find blocks: a prefill then never preempts."""
        if not self._may_admit(len(self._running)):
            return None
        sequence = next(iter(self._waiting))
        prefix = self._blocks.known_prefix(sequence)
        if not self._blocks.can_append(sequence, prefix):
            return None
        self._blocks.share(sequence, prefix)
        self._blocks.append(sequence)
        if sequence.num_cached_tokens is None:
            sequence.num_cached_tokens = min(sequence.num_computed_tokens, len(sequence.request.prompt_token_ids))
            self._num_cached_tokens += sequence.num_cached_tokens
        sequence.status = SequenceStatus.RUNNING
        del self._waiting[sequence]
        self._running[sequence] = None
        return sequence


def split_micro_batches(chunks: SequenceOf[ScheduledChunk], count: int) -> tuple[tuple[ScheduledChunk, ...], ...]:
    """Cuts a step into exactly `count` micro-batches, decodes first in each, whose token counts differ by at most 1.

    Prefill chunks are cut where a micro-batch is full. That is sound because in every layer micro-batch i writes its
    latents before i + 1 reads them (`model_shards.pipeline`), and only the last piece asks for logits:

        decodes a b c, prefill p of 6 tokens, 2 micro-batches   [ a b p0 p1 p2 ] [ c p3 p4 p5 ]
    """
    decodes = [chunk for chunk in chunks if chunk.is_decode]
    prefills = deque(chunk for chunk in chunks if not chunk.is_decode)
    # Even shares, the larger ones first for both, so a micro-batch's decodes never exceed its tokens.
    decode_shares = _even_shares(len(decodes), count)
    token_shares = _even_shares(sum(chunk.num_tokens for chunk in chunks), count)
    micro_batches: list[tuple[ScheduledChunk, ...]] = []
    first_decode = 0
    for num_decodes, num_tokens in zip(decode_shares, token_shares, strict=True):
        micro_batch = decodes[first_decode : first_decode + num_decodes]
        first_decode += num_decodes
        room = num_tokens - num_decodes
        while room > 0:
            chunk = prefills.popleft()
            if chunk.num_tokens > room:
                middle = chunk.start + room
                prefills.appendleft(replace(chunk, start=middle))
                chunk = replace(chunk, stop=middle, wants_logits=False)
            micro_batch.append(chunk)
            room -= chunk.num_tokens
        micro_batches.append(tuple(micro_batch))
    return tuple(micro_batches)


def _chunk(sequence: Sequence, budget: int) -> ScheduledChunk:
    """The next tokens of the sequence, at most `budget`."""
    start = sequence.num_computed_tokens
    stop = min(sequence.num_tokens, start + budget)
    return ScheduledChunk(sequence, start, stop, sequence.is_decoding, wants_logits=stop == sequence.num_tokens)


def _even_shares(total: int, count: int) -> list[int]:
    base, extra = divmod(total, count)
    return [base + (1 if index < extra else 0) for index in range(count)]
