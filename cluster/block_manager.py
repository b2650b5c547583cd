"""Who holds which block of the latent cache. Policy: no torch; `can_append` asks, `append` acts."""

from collections import deque
from collections.abc import Iterable

from cluster.limits import EngineLimits
from cluster.sequence import Sequence


class BlockManager:
    """Every block is either free or in the block table of exactly one sequence."""

    def __init__(self, limits: EngineLimits) -> None:
        self._limits = limits
        self._free: deque[int] = deque(range(limits.num_blocks))

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no sequence holds."""
        return len(self._free)

    def can_append(self, sequence: Sequence) -> bool:
        """Whether there are blocks for all tokens of the sequence."""
        return self._missing(sequence) <= len(self._free)

    def append(self, sequence: Sequence) -> None:
        """Gives the sequence the blocks it misses; must only be called when `can_append` says so."""
        for _ in range(self._missing(sequence)):
            sequence.block_table.append(self._free.popleft())

    def free(self, sequence: Sequence) -> None:
        """Takes all blocks of the sequence back; none is no error."""
        self._free.extend(sequence.block_table)
        del sequence.block_table[:]

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        """Raises AssertionError when a block is lost or held twice, given every sequence that may hold one."""
        held = [block for sequence in sequences for block in sequence.block_table]
        assert sorted([*self._free, *held]) == list(range(self._limits.num_blocks)), (
            f"blocks are lost or held twice: free {sorted(self._free)}, held {sorted(held)}"
        )

    def _missing(self, sequence: Sequence) -> int:
        return self._limits.blocks_for(sequence.num_tokens) - len(sequence.block_table)
