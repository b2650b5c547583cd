"""Blocks: asked for, given, known by their content, shared, evicted, taken back."""

from dataclasses import replace

import pytest

from cluster.block_manager import BlockManager
from cluster.limits import EngineLimits
from cluster.request import GenerationRequest
from cluster.sequence import Sequence

LIMITS = EngineLimits(
    max_model_len=64, max_num_seqs=3, max_num_batched_tokens=8, block_size=4, num_blocks=3, num_micro_batches=1
)


def sequence(num_tokens: int) -> Sequence:
    return of(*range(num_tokens))


def of(*token_ids: int) -> Sequence:
    return Sequence(GenerationRequest("s", token_ids, 8))


def run(blocks: BlockManager, running: Sequence, num_tokens: int | None = None) -> Sequence:
    """Admits a sequence and commits its tokens, or the first `num_tokens` of them."""
    prefix = blocks.known_prefix(running)
    assert blocks.can_append(running, prefix)
    blocks.share(running, prefix)
    blocks.append(running)
    start = running.num_computed_tokens
    running.num_computed_tokens = running.num_tokens if num_tokens is None else num_tokens
    blocks.publish(running, start, running.num_computed_tokens)
    return running


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


def test_a_full_block_is_known_once_its_tokens_are_committed_and_a_partial_one_never() -> None:
    blocks, held = BlockManager(LIMITS), sequence(11)
    blocks.append(held)
    assert blocks.known_prefix(sequence(11)) == []
    for start, stop, known in [(0, 3, 0), (3, 5, 1), (5, 11, 2)]:
        blocks.publish(held, start, stop)
        assert blocks.known_prefix(sequence(11)) == list(held.block_table)[:known]


@pytest.mark.parametrize(("num_tokens", "known"), [(1, 0), (4, 0), (5, 1), (8, 1), (9, 2), (12, 2)])
def test_the_last_token_is_always_computed(num_tokens: int, known: int) -> None:
    blocks = BlockManager(LIMITS)
    blocks.free(run(blocks, sequence(12)))
    again = sequence(num_tokens)
    prefix = blocks.known_prefix(again)
    blocks.share(again, prefix)
    assert (len(prefix), again.num_computed_tokens) == (known, 4 * known)


def test_equal_tokens_after_another_begin_are_another_content() -> None:
    blocks = BlockManager(LIMITS)
    blocks.free(run(blocks, of(1, 1, 1, 1, 2, 2, 2, 2)))
    assert len(blocks.known_prefix(of(1, 1, 1, 1, 2, 2, 2, 2, 0))) == 2
    assert len(blocks.known_prefix(of(1, 1, 1, 1, 2, 2, 2, 3, 0))) == 1
    assert blocks.known_prefix(of(2, 2, 2, 2, 0)) == []
    assert blocks.known_prefix(of(3, 1, 1, 1, 2, 2, 2, 2, 0)) == []


def test_output_is_known_as_the_prompt_is() -> None:
    blocks, first = BlockManager(LIMITS), sequence(3)
    run(blocks, first)
    for token_id in (3, 4):
        first.append(token_id)
    blocks.append(first)
    blocks.publish(first, 3, 4)
    assert blocks.known_prefix(sequence(5)) == list(first.block_table)[:1]


def test_a_shared_block_is_free_when_its_last_holder_gives_it_back() -> None:
    blocks = BlockManager(LIMITS)
    first = run(blocks, sequence(8))
    second = sequence(7)
    blocks.share(second, blocks.known_prefix(second))
    blocks.append(second)
    assert second.block_table[0] == first.block_table[0]
    assert second.block_table[1] != first.block_table[1]
    blocks.check_integrity([first, second])
    assert blocks.num_free_blocks == 0
    blocks.free(first)
    assert blocks.num_free_blocks == 1
    blocks.check_integrity([first, second])
    blocks.free(second)
    assert blocks.num_free_blocks == 3
    blocks.check_integrity([first, second])


def test_of_two_that_compute_the_same_at_once_the_second_keeps_its_blocks_to_itself() -> None:
    blocks = BlockManager(LIMITS)
    first, second = sequence(4), sequence(4)
    for held in (first, second):
        blocks.append(held)
        held.num_computed_tokens = 4
    for held in (first, second):
        table = list(held.block_table)
        blocks.publish(held, 0, 4)
        assert list(held.block_table) == table
    blocks.check_integrity([first, second])
    assert blocks.known_prefix(sequence(5)) == list(first.block_table)


def test_what_nobody_knows_is_taken_first_then_the_least_recently_used_its_tail_before_its_begin() -> None:
    blocks = BlockManager(replace(LIMITS, num_blocks=5))
    old, new = of(*[1] * 8), of(*[2] * 8)
    run(blocks, old)
    run(blocks, new)
    blocks.check_integrity([old, new])
    (old_begin, old_tail), (new_begin, new_tail) = old.block_table, new.block_table
    blocks.free(old)
    blocks.free(new)
    taker = of(*[3] * 20)
    foreseen = blocks.next_free(6)
    blocks.append(taker)
    assert list(taker.block_table)[1:] == [old_tail, old_begin, new_tail, new_begin]
    assert foreseen == list(taker.block_table), "there are five, in the order of taking"


def test_taking_a_prefix_makes_it_the_most_recently_used() -> None:
    blocks = BlockManager(replace(LIMITS, num_blocks=2))
    blocks.free(run(blocks, of(*[1] * 4)))
    blocks.free(run(blocks, of(*[2] * 4)))
    again = of(*[1] * 5)
    blocks.share(again, blocks.known_prefix(again))
    blocks.free(again)
    blocks.append(of(3))
    assert len(blocks.known_prefix(of(*[1] * 5))) == 1
    assert blocks.known_prefix(of(*[2] * 5)) == []


def test_asking_counts_evictable_blocks_but_not_those_of_the_sequences_own_prefix() -> None:
    blocks = BlockManager(replace(LIMITS, num_blocks=4))
    blocks.free(run(blocks, sequence(12)))
    assert blocks.num_free_blocks == 4
    assert blocks.can_append(of(*[9] * 16))
    run(blocks, sequence(5))
    assert blocks.num_free_blocks == 2
    assert not blocks.can_append(of(*[9] * 12))
    # The first block of their prefix is held, and so takes nothing from the two that are free; the others do.
    for num_tokens, num_known, fits in [(12, 2, True), (13, 3, False)]:
        asking = sequence(num_tokens)
        prefix = blocks.known_prefix(asking)
        assert len(prefix) == num_known
        assert blocks.can_append(asking, prefix) is fits


def test_what_is_in_doubt_is_forgotten_and_kept_by_who_holds_it() -> None:
    blocks = BlockManager(LIMITS)
    first = run(blocks, sequence(5))
    second = sequence(5)
    blocks.share(second, blocks.known_prefix(second))
    blocks.append(second)
    table = list(second.block_table)
    blocks.forget(first)
    blocks.free(first)
    assert blocks.known_prefix(sequence(5)) == []
    assert list(second.block_table) == table
    blocks.check_integrity([first, second])
    blocks.free(second)
    assert blocks.num_free_blocks == 3
    blocks.check_integrity([second])


def test_without_the_prefix_cache_nothing_is_known() -> None:
    blocks = BlockManager(replace(LIMITS, prefix_cache=False))
    blocks.free(run(blocks, sequence(12)))
    assert blocks.known_prefix(sequence(12)) == []
    blocks.check_integrity([])


def test_integrity_finds_a_lost_block() -> None:
    blocks, held = BlockManager(LIMITS), sequence(4)
    blocks.append(held)
    with pytest.raises(AssertionError, match="lost"):
        blocks.check_integrity([])


def test_integrity_finds_a_holder_that_is_not_counted() -> None:
    blocks = BlockManager(LIMITS)
    held, thief = run(blocks, sequence(5)), sequence(5)
    thief.block_table.append(held.block_table[0])
    thief.num_computed_tokens = 4
    with pytest.raises(AssertionError, match="is held 2 times, counted 1"):
        blocks.check_integrity([held, thief])


def test_integrity_finds_a_known_or_shared_block_that_is_about_to_be_written() -> None:
    blocks = BlockManager(LIMITS)
    held, sharer = run(blocks, sequence(5)), sequence(5)
    blocks.share(sharer, blocks.known_prefix(sharer))
    sharer.num_computed_tokens = 0
    with pytest.raises(AssertionError, match="held twice"):
        blocks.check_integrity([held, sharer])
    blocks.free(sharer)
    held.num_computed_tokens = 0
    with pytest.raises(AssertionError, match="known and not computed"):
        blocks.check_integrity([held])
