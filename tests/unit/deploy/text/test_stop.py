"""Stop strings against the slow way."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from deploy.text import TextDelta
from deploy.text.stop import StopStrings
from model_shards.errors import InvalidRequestError
from tests.stop_reference import cut_by_hand, length_of_begun_stop

# Two letters make stop strings overlap, repeat and begin one another all the time.
LETTERS = st.sampled_from("ab")
STOPS = st.lists(st.text(LETTERS, min_size=1, max_size=5), max_size=4)
PIECES = st.lists(st.text(LETTERS, max_size=4), max_size=12)


@settings(max_examples=30, deadline=None)
@given(pieces=PIECES, stop=STOPS)
@example(pieces=["xxab", "c"], stop=["abc", "ab"])
@example(pieces=["aab"], stop=["ab", "aab"])
@example(pieces=["a", "a", "b"], stop=["aab", "ab"])
@example(pieces=["ab", "aba", "bb"], stop=["ababb"])
def test_the_text_ends_exactly_before_the_first_stop_string_however_it_is_cut(
    pieces: list[str], stop: list[str]
) -> None:
    stream = StopStrings(stop)
    deltas = [stream.push(piece) for piece in pieces]
    last = stream.finish()
    text, stopped = cut_by_hand("".join(pieces), stop)
    assert "".join(delta.text for delta in deltas) + last.text == text
    assert last.stopped == stopped


@settings(max_examples=30, deadline=None)
@given(pieces=PIECES, stop=STOPS)
def test_nothing_is_held_back_but_what_may_begin_a_stop_string(pieces: list[str], stop: list[str]) -> None:
    stream, given_out, taken = StopStrings(stop), "", ""
    for piece in pieces:
        delta = stream.push(piece)
        given_out, taken = given_out + delta.text, taken + piece
        text, stopped = cut_by_hand(taken, stop)
        assert delta.stopped == stopped
        assert len(text) - len(given_out) == (0 if stopped else length_of_begun_stop(taken, stop))


def test_after_a_stop_string_nothing_comes() -> None:
    stream = StopStrings(["</end>"])
    assert [stream.push(piece) for piece in ("a <", "/en", "x </e", "nd> more")] == [
        TextDelta("a ", False),
        TextDelta("", False),
        TextDelta("</enx ", False),
        TextDelta("", True),
    ]
    assert stream.push("and more") == TextDelta("", True)
    assert stream.finish() == TextDelta("", True)


def test_of_a_stop_string_and_its_beginning_the_shorter_is_complete_first() -> None:
    for stop in (["ab", "abc"], ["abc", "ab"]):
        assert StopStrings(stop).push("xxabcd") == TextDelta("xx", True)


def test_of_two_complete_at_once_the_longer_is_cut_off() -> None:
    for stop in (["bc", "abc"], ["abc", "bc"]):
        assert StopStrings(stop).push("xxabcd") == TextDelta("xx", True)


def test_what_is_held_back_comes_with_the_end() -> None:
    stream = StopStrings(["stop"])
    assert stream.push("I sto") == TextDelta("I ", False)
    assert stream.finish() == TextDelta("sto", False)
    assert stream.finish() == TextDelta("", False)


@pytest.mark.parametrize("stop", [[""], ["a", ""]])
def test_an_empty_stop_string_is_refused(stop: list[str]) -> None:
    with pytest.raises(InvalidRequestError, match="at least one character"):
        StopStrings(stop)
