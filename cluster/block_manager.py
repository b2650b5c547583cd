"""Who holds which block of the latent cache, and what is in it. Policy: no torch; `can_append` asks, `append` acts.

A full block of computed tokens is known by a hash of its tokens and, through its parent's hash, of all before them:

    tokens        [ a b c d | e f g h | i j . . ]        block size 4
    known by        H(abcd)   H(H(abcd) efgh)  not full

    free      unknown, no holder   what a new block is taken from first
    cached    known, no holder     then from here, the least recently used one, which is forgotten
    held      known or not         in the block tables of one sequence or, if known, of several

A sequence writes only behind its last full block of computed tokens, so nobody ever writes into a shared block.
"""

from array import array
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from hashlib import blake2b
from itertools import chain, islice

from cluster.limits import EngineLimits
from cluster.sequence import Sequence


class BlockManager:
    """Owns all blocks. Without `EngineLimits.prefix_cache` none is ever known, and so none is cached or shared."""

    def __init__(self, limits: EngineLimits) -> None:
        self._limits = limits
        self._free: deque[int] = deque(range(limits.num_blocks))
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._num_holders = [0] * limits.num_blocks
        self._block_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no sequence holds, known or not."""
        return len(self._free) + len(self._cached)

    def known_prefix(self, sequence: Sequence) -> list[int]:
        """The known blocks that its tokens begin with, as many as there are; takes none.

        At least the last token is left out: it must be computed, since the next one is sampled from its logits.
        """
        prefix: list[int] = []
        while (len(prefix) + 1) * self._limits.block_size < sequence.num_tokens:
            block = self._block_of.get(self._hash(sequence, len(prefix)))
            if block is None:
                break
            prefix.append(block)
        return prefix

    def can_append(self, sequence: Sequence, prefix: SequenceOf[int] = ()) -> bool:
        """Whether there are blocks for all tokens of the sequence, if it takes `prefix` first."""
        missing = self._missing(sequence) - len(prefix)
        return missing <= self.num_free_blocks - sum(not self._num_holders[block] for block in prefix)

    def share(self, sequence: Sequence, prefix: Iterable[int]) -> None:
        """Makes the known blocks `prefix` the begin of a sequence that has no block; their tokens count as computed."""
        for block in prefix:
            self._cached.pop(block, None)
            self._num_holders[block] += 1
            sequence.block_table.append(block)
        sequence.num_computed_tokens = len(sequence.block_table) * self._limits.block_size

    def append(self, sequence: Sequence) -> None:
        """Gives the sequence the blocks it misses; must only be called when `can_append` says so."""
        for _ in range(self._missing(sequence)):
            block = self._free.popleft() if self._free else self._evict()
            self._num_holders[block] = 1
            sequence.block_table.append(block)

    def next_free(self, count: int) -> list[int]:
        """The blocks that `append` takes next, in that order; fewer than `count` when there are no more. Takes none."""
        return list(islice(chain(self._free, self._cached), count))

    def publish(self, sequence: Sequence, start: int, stop: int) -> None:
        """Makes the blocks known that became full when tokens [start, stop) were committed.

        A block whose content is known already, of a sequence that was computed at the same time, stays unknown.
        """
        if not self._limits.prefix_cache:
            return
        for index in range(start // self._limits.block_size, stop // self._limits.block_size):
            content, block = self._hash(sequence, index), sequence.block_table[index]
            if content not in self._block_of:
                self._block_of[content] = block
                self._hash_of[block] = content

    def forget(self, sequence: Sequence) -> None:
        """Makes all blocks of the sequence unknown: what is in them is in doubt. Whoever holds them keeps them."""
        for block in sequence.block_table:
            self._forget(block)

    def free(self, sequence: Sequence) -> None:
        """Takes all blocks of the sequence back; none is no error."""
        # The last first, so that it is evicted first: without its parents a block is of no use.
        for block in reversed(sequence.block_table):
            self._num_holders[block] -= 1
            if self._num_holders[block]:
                continue
            if block in self._hash_of:
                self._cached[block] = None
            else:
                self._free.append(block)
        del sequence.block_table[:]

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        """Raises AssertionError when a block is lost, miscounted or in a wrong place, or could be overwritten.

        `sequences` are all that may hold a block.
        """
        sequences = list(sequences)
        held = Counter(block for sequence in sequences for block in sequence.block_table)
        assert sorted([*self._free, *self._cached, *held]) == list(range(self._limits.num_blocks)), (
            f"blocks are lost or held twice: free {sorted(self._free)}, cached {sorted(self._cached)}, "
            f"held {sorted(held)}"
        )
        for block, num_holders in enumerate(self._num_holders):
            assert num_holders == held[block], f"block {block} is held {held[block]} times, counted {num_holders}"
        assert {block: content for content, block in self._block_of.items()} == self._hash_of, "the maps disagree"
        assert len(self._block_of) == len(self._hash_of), "two contents have one block"
        assert self._hash_of.keys() >= self._cached.keys(), "an unknown block is cached"
        assert self._hash_of.keys().isdisjoint(self._free), "a known block is free"
        for sequence in sequences:
            for block in sequence.block_table[sequence.num_computed_tokens // self._limits.block_size :]:
                assert held[block] == 1, f"block {block} is written by one sequence and held twice"
                assert block not in self._hash_of, f"block {block} is known and not computed"

    def _missing(self, sequence: Sequence) -> int:
        return self._limits.blocks_for(sequence.num_tokens) - len(sequence.block_table)

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        self._forget(block)
        return block

    def _forget(self, block: int) -> None:
        content = self._hash_of.pop(block, None)
        if content is not None:
            del self._block_of[content]

    def _hash(self, sequence: Sequence, index: int) -> bytes:
        """The content hash of block `index`; kept by the sequence, whose tokens never change."""
        hashes, size = sequence.block_hashes, self._limits.block_size
        while len(hashes) <= index:
            start = len(hashes) * size
            tokens = array("q", sequence.token_ids[start : start + size])
            # A strong hash: who finds two contents with one hash would read another's context.
            hashes.append(blake2b((hashes[-1] if hashes else b"") + tokens.tobytes(), digest_size=32).digest())
        return hashes[index]
