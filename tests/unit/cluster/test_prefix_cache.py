"""The scheduler with its block manager beside the same scheduler with a slow one that compares tokens, at random.

The slow one is written for being obvious: contents are tuples of all tokens from the begin, and one list holds the
blocks that nobody holds in the order in which they were given back. Beside both, every slot remembers which tokens
were written to it, so that a chunk that would read another context is found at once.
"""

from dataclasses import replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cluster.block_manager import BlockManager
from cluster.limits import EngineLimits
from cluster.request import GenerationRequest
from cluster.scheduler import ScheduledChunk, Scheduler
from cluster.sequence import Sequence, SequenceStatus


class SlowBlocks(BlockManager):
    """The contract of a BlockManager in the fewest thoughts."""

    def __init__(self, limits: EngineLimits) -> None:
        super().__init__(limits)
        self.limits = limits
        self.known: dict[tuple[int, ...], int] = {}  # tokens from the begin -> block of the last of them
        self.holders = [0] * limits.num_blocks
        self.unheld = list(range(limits.num_blocks))  # in the order in which they were given back

    @property
    def num_free_blocks(self) -> int:
        return len(self.unheld)

    def known_prefix(self, sequence):
        prefix = []
        for stop in range(self.limits.block_size, sequence.num_tokens, self.limits.block_size):
            if tuple(sequence.token_ids[:stop]) not in self.known:
                break
            prefix.append(self.known[tuple(sequence.token_ids[:stop])])
        return prefix

    def can_append(self, sequence, prefix=()):
        have = len(sequence.block_table) + len(prefix) + len(set(self.unheld) - set(prefix))
        return have * self.limits.block_size >= sequence.num_tokens

    def share(self, sequence, prefix):
        for block in prefix:
            self._take(sequence, block)
        sequence.num_computed_tokens = len(prefix) * self.limits.block_size

    def append(self, sequence):
        while len(sequence.block_table) * self.limits.block_size < sequence.num_tokens:
            unknown = [block for block in self.unheld if block not in self.known.values()]
            self._take(sequence, block := [*unknown, *self.unheld][0])
            self.known = {tokens: other for tokens, other in self.known.items() if other != block}

    def publish(self, sequence, start, stop):
        for index, block in enumerate(sequence.block_table):
            full = (index + 1) * self.limits.block_size
            if self.limits.prefix_cache and start < full <= stop:
                self.known.setdefault(tuple(sequence.token_ids[:full]), block)

    def forget(self, sequence):
        self.known = {tokens: block for tokens, block in self.known.items() if block not in sequence.block_table}

    def free(self, sequence):
        for block in reversed(sequence.block_table):
            self.holders[block] -= 1
            if self.holders[block] == 0:
                self.unheld.append(block)
        del sequence.block_table[:]

    def check_integrity(self, sequences):
        """Nothing to find: it counts nothing twice."""

    def _take(self, sequence, block):
        self.holders[block] += 1
        if block in self.unheld:
            self.unheld.remove(block)
        sequence.block_table.append(block)


class SlowScheduler(Scheduler):
    """The same policy over the slow blocks."""

    def __init__(self, limits: EngineLimits) -> None:
        super().__init__(limits)
        self._blocks = SlowBlocks(limits)


def seen(chunks: tuple[ScheduledChunk, ...]) -> list[tuple[object, ...]]:
    """All of a chunk but which of the two schedulers' sequences it belongs to."""
    return [
        (chunk.sequence.request.request_id, chunk.start, chunk.stop, chunk.is_decode, chunk.wants_logits)
        for chunk in chunks
    ]


def next_token(sequence: Sequence) -> int:
    """Few tokens, and equal ones after equal ones: outputs are found in the cache as prompts are."""
    return (sum(sequence.token_ids) + len(sequence.token_ids)) % 2


class TwoSchedulers(RuleBasedStateMachine):
    """Requests with common prefixes, steps that are committed or lost, cancellations, answers that fail."""

    @initialize(
        block_size=st.integers(1, 4),
        num_blocks=st.integers(2, 12),
        max_num_seqs=st.integers(1, 4),
        more_tokens=st.integers(0, 10),
        prefix_cache=st.sampled_from([True, True, True, False]),
    )
    def start(self, block_size, num_blocks, max_num_seqs, more_tokens, prefix_cache):
        self.limits = EngineLimits(
            max_model_len=block_size * num_blocks,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_seqs + more_tokens,
            block_size=block_size,
            num_blocks=num_blocks,
            num_micro_batches=1,
            prefix_cache=prefix_cache,
        )
        self.scheduler, self.slow = Scheduler(self.limits), SlowScheduler(self.limits)
        self.pairs: dict[str, tuple[Sequence, Sequence]] = {}  # of the fast and the slow scheduler
        self.written: dict[tuple[int, int], tuple[int, ...]] = {}  # (block, offset) -> all tokens up to this one
        self.count = 0

    @rule(
        kind=st.integers(0, 2), common=st.integers(0, 12), own=st.lists(st.integers(0, 1), max_size=4), more=st.data()
    )
    def add(self, kind, common, own, more):
        prompt = ([(kind, 1, 0)[index % 3] for index in range(common)] + own) or [kind]
        prompt = prompt[: self.limits.max_model_len - 1]
        max_tokens = more.draw(st.integers(1, min(8, self.limits.max_model_len - len(prompt))))
        self.count += 1
        request = GenerationRequest(f"r{self.count}", tuple(prompt), max_tokens)
        pair = Sequence(request), Sequence(request)
        self.scheduler.add(pair[0])
        self.slow.add(pair[1])
        self.pairs[request.request_id] = pair

    @precondition(lambda self: self.pairs)
    @rule(number=st.integers(0, 100))
    def cancel(self, number):
        self.end(sorted(self.pairs)[number % len(self.pairs)])

    @rule(cancelled=st.sets(st.integers(0, 3), max_size=1), failed=st.sets(st.integers(0, 15), max_size=1))
    def commit(self, cancelled, failed):
        chunks, slow_chunks = self.schedule()
        self.scheduler.commit(chunks)
        self.slow.commit(slow_chunks)
        for number, (chunk, slow_chunk) in enumerate(zip(chunks, slow_chunks, strict=True)):
            request_id = chunk.sequence.request.request_id
            if chunk.wants_logits and number in failed:
                self.scheduler.forget(chunk.sequence)
                self.slow.forget(slow_chunk.sequence)
                self.end(request_id)
            elif number in cancelled:
                self.end(request_id)
            elif chunk.wants_logits:
                token = next_token(chunk.sequence)
                slow_chunk.sequence.append(token)
                if chunk.sequence.append(token) is not None:
                    self.end(request_id)

    @rule()
    def lose(self):
        before, _ = self.schedule()
        tables = [list(chunk.sequence.block_table) for chunk in before]
        again, _ = self.schedule()
        assert again == before
        assert [list(chunk.sequence.block_table) for chunk in again] == tables

    @invariant()
    def both_agree(self):
        if not hasattr(self, "limits"):
            return
        self.scheduler.check_integrity()
        for name in ("num_running", "num_waiting", "num_free_blocks", "num_preemptions", "num_cached_tokens"):
            assert getattr(self.scheduler, name) == getattr(self.slow, name), name
        held = {block for sequence, _ in self.pairs.values() for block in sequence.block_table}
        assert self.scheduler.num_free_blocks == self.limits.num_blocks - len(held)
        for sequence, slow_sequence in self.pairs.values():
            assert sequence.status is slow_sequence.status
            assert sequence.num_computed_tokens == slow_sequence.num_computed_tokens
            assert len(sequence.block_table) == len(slow_sequence.block_table)
            assert self.limits.prefix_cache or not sequence.num_cached_tokens

    def teardown(self):
        if not hasattr(self, "limits"):
            return
        steps = 0
        while self.pairs:
            self.commit(cancelled=set(), failed=set())
            self.both_agree()
            steps += 1
            assert steps < 10_000, "a request starves"
        assert self.scheduler.num_free_blocks == self.limits.num_blocks

    def schedule(self):
        """Both schedulers' chunks, which must be alike; the step is computed, whatever becomes of it."""
        chunks, slow_chunks = self.scheduler.schedule(), self.slow.schedule()
        assert seen(chunks) == seen(slow_chunks)
        self.both_agree()
        assert bool(chunks) == bool(self.pairs)
        assert sum(chunk.num_tokens for chunk in chunks) <= self.limits.max_num_batched_tokens
        for chunk in chunks:
            sequence = chunk.sequence
            for position in range(chunk.stop):
                block, offset = divmod(position, self.limits.block_size)
                slot = (sequence.block_table[block], offset)
                context = tuple(sequence.token_ids[: position + 1])
                if position < chunk.start:
                    assert self.written[slot] == context, f"position {position} holds another context"
                self.written[slot] = context
        return chunks, slow_chunks

    def end(self, request_id):
        sequence, slow_sequence = self.pairs.pop(request_id)
        self.scheduler.remove(sequence)
        self.slow.remove(slow_sequence)
        assert sequence.status is SequenceStatus.ENDED
        assert not sequence.block_table


TestTwoSchedulers = TwoSchedulers.TestCase
TestTwoSchedulers.settings = settings(deadline=None, max_examples=80, stateful_step_count=40)


def test_the_scheduler_with_the_slow_blocks_shares_at_all() -> None:
    """So that the two do not agree on doing nothing."""
    limits = EngineLimits(32, 2, 8, block_size=4, num_blocks=8, num_micro_batches=1)
    for limits_, computed in [(limits, 4), (replace(limits, prefix_cache=False), 0)]:
        for scheduler in (Scheduler(limits_), SlowScheduler(limits_)):
            first, second = (Sequence(GenerationRequest(name, (1, 2, 3, 4, 5), 1)) for name in "ab")
            scheduler.add(first)
            scheduler.commit(scheduler.schedule())
            scheduler.remove(first)
            scheduler.add(second)
            assert [chunk.start for chunk in scheduler.schedule()] == [computed]
