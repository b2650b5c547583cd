"""Blocks: asked for, given, taken back."""

import pytest

from cluster.block_manager import BlockManager
from cluster.limits import EngineLimits
from cluster.request import GenerationRequest
from cluster.sequence import Sequence

LIMITS = EngineLimits(
    max_model_len=64, max_num_seqs=3, max_num_batched_tokens=8, block_size=4, num_blocks=3, num_micro_batches=1
)


def sequence(num_tokens: int) -> Sequence:
    return Sequence(GenerationRequest("s", tuple(range(num_tokens)), 8))


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(1, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_a_sequence_gets_as_many_blocks_as_its_tokens_fill(num_tokens: int, num_blocks: int) -> None:
    blocks, held = BlockManager(LIMITS), sequence(num_tokens)
    assert blocks.can_append(held)
    blocks.append(held)
    assert len(held.block_table) == num_blocks
    assert blocks.num_free_blocks == 3 - num_blocks
    blocks.check_integrity([held])


def test_asking_says_no_when_blocks_are_short_and_takes_nothing() -> None:
    blocks = BlockManager(LIMITS)
    assert not blocks.can_append(sequence(13))
    assert blocks.num_free_blocks == 3


def test_appending_twice_gives_no_second_block() -> None:
    blocks, held = BlockManager(LIMITS), sequence(4)
    blocks.append(held)
    table = list(held.block_table)
    blocks.append(held)
    assert list(held.block_table) == table
    held.append(1)
    blocks.append(held)
    assert list(held.block_table)[:1] == table
    assert len(held.block_table) == 2


def test_freed_blocks_are_given_again() -> None:
    blocks, first, second = BlockManager(LIMITS), sequence(12), sequence(12)
    blocks.append(first)
    blocks.free(first)
    blocks.free(first)
    blocks.append(second)
    assert sorted(second.block_table) == [0, 1, 2]
    blocks.check_integrity([first, second])


def test_integrity_finds_a_lost_block() -> None:
    blocks, held = BlockManager(LIMITS), sequence(4)
    blocks.append(held)
    with pytest.raises(AssertionError, match="lost"):
        blocks.check_integrity([])
