"""The scheduler's policy, without torch."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.limits import EngineLimits
from cluster.request import GenerationRequest
from cluster.scheduler import ScheduledChunk, Scheduler, split_micro_batches
from cluster.sequence import Sequence

LIMITS = EngineLimits(
    max_model_len=64, max_num_seqs=3, max_num_batched_tokens=8, block_size=4, num_blocks=8, num_micro_batches=2
)


def sequence(prompt_len: int, max_tokens: int = 16, name: str = "s") -> Sequence:
    return Sequence(GenerationRequest(name, tuple(range(prompt_len)), max_tokens))


def commit(scheduler: Scheduler, chunks: tuple[ScheduledChunk, ...]) -> None:
    scheduler.commit(chunks)
    for chunk in chunks:
        if chunk.wants_logits:
            chunk.sequence.append(1)


def shape(chunks: tuple[ScheduledChunk, ...]) -> list[tuple[str, int, int, bool]]:
    return [(chunk.sequence.request.request_id, chunk.start, chunk.stop, chunk.wants_logits) for chunk in chunks]


def test_the_oldest_prefill_gets_the_budget_first_and_logits_come_with_its_last_chunk() -> None:
    scheduler = Scheduler(LIMITS)
    scheduler.add(sequence(11, name="a"))
    scheduler.add(sequence(4, name="b"))
    first = scheduler.schedule()
    assert shape(first) == [("a", 0, 8, False)]
    commit(scheduler, first)
    second = scheduler.schedule()
    assert shape(second) == [("a", 8, 11, True), ("b", 0, 4, True)]
    commit(scheduler, second)
    assert [chunk.is_decode for chunk in scheduler.schedule()] == [True, True]


def test_decodes_come_first_whatever_the_order_of_arrival() -> None:
    scheduler = Scheduler(replace(LIMITS, max_num_batched_tokens=6, prefix_cache=False))
    scheduler.add(sequence(10, name="long"))
    commit(scheduler, scheduler.schedule())
    scheduler.add(sequence(1, name="short"))
    chunks = scheduler.schedule()
    assert shape(chunks) == [("long", 6, 10, True), ("short", 0, 1, True)]
    commit(scheduler, chunks)
    scheduler.add(sequence(9, name="new"))
    assert shape(scheduler.schedule()) == [("long", 10, 11, True), ("short", 1, 2, True), ("new", 0, 4, False)]


def test_beside_decodes_stand_no_more_prefill_tokens_than_are_allowed() -> None:
    scheduler = Scheduler(replace(LIMITS, max_num_batched_tokens=6, prefix_cache=False))
    scheduler.add(sequence(10, name="long"))
    asked: list[int] = []

    def most_beside(num_decodes: int) -> int | None:
        asked.append(num_decodes)
        return 2 if num_decodes else None

    first = scheduler.schedule(most_beside)
    assert shape(first) == [("long", 0, 6, False)]
    commit(scheduler, first)
    commit(scheduler, scheduler.schedule(most_beside))
    scheduler.add(sequence(9, name="new"))
    second = scheduler.schedule(most_beside)
    assert shape(second) == [("long", 10, 11, True), ("new", 0, 2, False)]
    commit(scheduler, second)
    assert shape(scheduler.schedule(most_beside)) == [("long", 11, 12, True), ("new", 2, 4, False)]
    assert asked == [0, 0, 1, 1]


def test_no_more_than_max_num_seqs_run_and_the_rest_waits_in_order() -> None:
    scheduler = Scheduler(LIMITS)
    for name in "abcde":
        scheduler.add(sequence(1, name=name))
    assert [chunk.sequence.request.request_id for chunk in scheduler.schedule()] == ["a", "b", "c"]
    assert (scheduler.num_running, scheduler.num_waiting) == (3, 2)


def test_a_request_that_must_wait_for_blocks_is_not_overtaken() -> None:
    scheduler = Scheduler(LIMITS)
    scheduler.add(sequence(8, name="a"))
    scheduler.add(sequence(30, name="big"))
    scheduler.add(sequence(1, name="small"))
    commit(scheduler, scheduler.schedule())
    assert shape(scheduler.schedule()) == [("a", 8, 9, True)]


def test_the_newest_is_preempted_and_comes_back_first() -> None:
    scheduler = Scheduler(replace(LIMITS, num_blocks=3, prefix_cache=False))
    old, new = sequence(4, name="old"), sequence(4, name="new")
    scheduler.add(old)
    scheduler.add(new)
    scheduler.add(sequence(5, name="later"))
    commit(scheduler, scheduler.schedule())
    # Both need a second block and one is left: the newest gives way, and nobody is admitted into what it gave.
    chunks = scheduler.schedule()
    assert shape(chunks) == [("old", 4, 5, True)]
    assert (new.num_computed_tokens, len(new.block_table), scheduler.num_preemptions) == (0, 0, 1)
    scheduler.check_integrity()
    commit(scheduler, chunks)
    scheduler.remove(old)
    # Its prompt and the token it had generated are computed again.
    assert shape(scheduler.schedule()) == [("new", 0, 5, True)]


def test_a_preempted_sequence_takes_back_what_was_not_evicted_and_that_is_no_hit() -> None:
    scheduler = Scheduler(replace(LIMITS, num_blocks=4))
    old, new = Sequence(GenerationRequest("old", (9, 9, 9, 9), 16)), sequence(8, name="new")
    scheduler.add(old)
    commit(scheduler, scheduler.schedule())
    scheduler.add(new)
    commit(scheduler, scheduler.schedule())
    commit(scheduler, scheduler.schedule())
    # Two full blocks are computed of it and there is no third for its ninth token.
    assert shape(scheduler.schedule()) == [("old", 6, 7, True)]
    assert (new.num_computed_tokens, scheduler.num_preemptions) == (0, 1)
    scheduler.remove(old)
    assert shape(scheduler.schedule()) == [("new", 8, 9, True)]
    assert scheduler.num_cached_tokens == 0
    scheduler.check_integrity()


def test_of_two_equal_sequences_that_both_computed_their_prompt_the_preempted_one_shares_the_others_at_once() -> None:
    scheduler = Scheduler(replace(LIMITS, num_blocks=3))
    old, new = sequence(4, name="old"), sequence(4, name="new")
    scheduler.add(old)
    scheduler.add(new)
    commit(scheduler, scheduler.schedule())
    assert old.block_table[0] != new.block_table[0]
    # Both need a second block and one is left.
    assert shape(scheduler.schedule()) == [("old", 4, 5, True), ("new", 4, 5, True)]
    assert old.block_table[0] == new.block_table[0]
    assert scheduler.num_preemptions == 1
    scheduler.check_integrity()


def test_scheduling_again_without_a_commit_gives_the_same_tokens_and_blocks() -> None:
    scheduler = Scheduler(LIMITS)
    scheduler.add(sequence(11, name="a"))
    first = scheduler.schedule()
    table = list(first[0].sequence.block_table)
    assert scheduler.schedule() == first
    assert list(first[0].sequence.block_table) == table


def test_a_sequence_starts_behind_what_an_earlier_one_left_and_one_of_it_is_counted() -> None:
    scheduler = Scheduler(LIMITS)
    scheduler.add(sequence(7, name="a"))
    commit(scheduler, scheduler.schedule())
    scheduler.add(sequence(13, name="b"))
    chunks = scheduler.schedule()
    assert shape(chunks) == [("a", 7, 8, True), ("b", 4, 11, False)]
    assert chunks[0].sequence.block_table[0] == chunks[1].sequence.block_table[0]
    assert scheduler.num_cached_tokens == 4
    scheduler.check_integrity()


def test_a_step_that_is_not_committed_leaves_nothing_to_share() -> None:
    scheduler = Scheduler(LIMITS)
    scheduler.add(sequence(8, name="a"))
    assert shape(scheduler.schedule()) == [("a", 0, 8, True)]
    scheduler.add(sequence(8, name="b"))
    assert shape(scheduler.schedule()) == [("a", 0, 8, True)]
    commit(scheduler, scheduler.schedule())
    assert shape(scheduler.schedule()) == [("a", 8, 9, True), ("b", 4, 8, True)]


def test_a_sequence_of_which_all_but_one_token_is_known_decodes_from_the_start() -> None:
    scheduler = Scheduler(LIMITS)
    first = sequence(5, name="first")
    scheduler.add(first)
    commit(scheduler, scheduler.schedule())
    scheduler.remove(first)
    scheduler.add(Sequence(GenerationRequest("other", (9,), 4)))
    scheduler.add(sequence(5, name="again"))
    chunks = scheduler.schedule()
    # Decodes come first, and so they do when the step is lost and scheduled again.
    assert shape(chunks) == [("again", 4, 5, True), ("other", 0, 1, True)]
    assert [chunk.is_decode for chunk in chunks] == [True, False]
    assert scheduler.schedule() == chunks
    for part in split_micro_batches(chunks, 2):
        assert [chunk.num_tokens for chunk in part] == [1]


def test_removing_a_waiting_sequence_leaves_the_others() -> None:
    scheduler = Scheduler(LIMITS)
    gone, stays = sequence(2, name="gone"), sequence(2, name="stays")
    scheduler.add(gone)
    scheduler.add(stays)
    scheduler.remove(gone)
    assert shape(scheduler.schedule()) == [("stays", 0, 2, True)]
    scheduler.check_integrity()


def test_integrity_finds_a_block_that_two_sequences_hold() -> None:
    scheduler = Scheduler(LIMITS)
    scheduler.add(sequence(2))
    (chunk,) = scheduler.schedule()
    chunk.sequence.block_table.append(7)
    with pytest.raises(AssertionError, match="held twice"):
        scheduler.check_integrity()


def test_the_worked_example_of_the_split() -> None:
    decodes = [ScheduledChunk(sequence(3, name=name), 2, 3, True, True) for name in "abc"]
    prefill = ScheduledChunk(sequence(6, name="p"), 0, 6, False, True)
    first, second = split_micro_batches([*decodes, prefill], 2)
    assert shape(first) == [("a", 2, 3, True), ("b", 2, 3, True), ("p", 0, 3, False)]
    assert shape(second) == [("c", 2, 3, True), ("p", 3, 6, True)]


@settings(deadline=None)
@given(st.integers(0, 9), st.lists(st.integers(1, 20), max_size=5), st.integers(1, 5))
def test_a_split_loses_nothing_and_differs_by_at_most_one_token(
    num_decodes: int, prefills: list[int], count: int
) -> None:
    chunks = [ScheduledChunk(sequence(5), 4, 5, True, True) for _ in range(num_decodes)]
    chunks += [ScheduledChunk(sequence(40), 3, 3 + length, False, length % 2 == 0) for length in prefills]
    parts = split_micro_batches(chunks, count)
    sizes = [sum(chunk.num_tokens for chunk in part) for part in parts]
    assert len(parts) == count
    assert max(sizes) - min(sizes) <= 1
    for part in parts:
        kinds = [chunk.is_decode for chunk in part]
        assert kinds == sorted(kinds, reverse=True)
        assert len({id(chunk.sequence) for chunk in part}) == len(part)
    for chunk in chunks:
        pieces = [piece for part in parts for piece in part if piece.sequence is chunk.sequence]
        assert [piece.start for piece in pieces] == [chunk.start, *(piece.stop for piece in pieces[:-1])]
        assert pieces[-1].stop == chunk.stop
        assert [piece.wants_logits for piece in pieces] == [False] * (len(pieces) - 1) + [chunk.wants_logits]
