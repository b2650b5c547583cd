"""Text of a stream against the text of the whole: the same, as early as it is certain, and never half a character."""

import json
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from deploy.models import default_model_directory
from deploy.text import ChatTokenizer, IncrementalDetokenizer
from model_shards.errors import InvalidRequestError
from tests.stop_reference import cut_by_hand

TOKENIZER = ChatTokenizer.load(default_model_directory())
BYTES = range(2, 258)  # tokens of one byte each, which random ones seldom make UTF-8
BOS, EOS = 0, 1
# Characters of one to four bytes, joined ones, and U+FFFD itself, which is no sign of damage here.
TEXTS = st.text(st.characters(codec="utf-8") | st.sampled_from("aé你😀\u200d\ufe0f\ufffd \n"), max_size=12)
PLAIN_IDS = TEXTS.map(lambda text: TOKENIZER.encode(text)[1:])
HALVES = st.tuples(PLAIN_IDS, st.integers(0, 12), st.integers(0, 12)).map(lambda cut: cut[0][cut[1] :][: cut[2]])
ANY_ID = st.integers(0, 4095) | st.sampled_from(BYTES) | st.sampled_from([BOS, EOS, 4096, 99_999])
STREAMS = st.lists(PLAIN_IDS | HALVES | st.lists(ANY_ID, max_size=6), max_size=6).map(
    lambda parts: list(chain.from_iterable(parts))
)


def emoji_bytes() -> list[int]:
    """A character of four tokens."""
    ids = TOKENIZER.encode("😀")[1:]
    assert len(ids) == 4
    return ids


EMOJI = emoji_bytes()
LEAD, CONTINUATION = EMOJI[0], EMOJI[1]


def stream(tokenizer: ChatTokenizer, token_ids: Sequence[int]) -> list[str]:
    """The text of each token, and of the end."""
    detokenizer = IncrementalDetokenizer(tokenizer, ())
    deltas = [detokenizer.push([token_id]).text for token_id in token_ids]
    return [*deltas, detokenizer.finish().text]


@settings(max_examples=30, deadline=None)
@given(token_ids=STREAMS)
@example(token_ids=[])
@example(token_ids=EMOJI[:3])
@example(token_ids=EMOJI[:3] + EMOJI)
@example(token_ids=[LEAD] * 30)
@example(token_ids=[CONTINUATION] * 30 + EMOJI)
@example(token_ids=[*EMOJI[:2], BOS, *EMOJI[2:]])
@example(token_ids=TOKENIZER.encode("\ufffd" * 12 + "a")[1:])
def test_the_deltas_together_are_the_text_of_all_tokens(token_ids: list[int]) -> None:
    assert "".join(stream(TOKENIZER, token_ids)) == TOKENIZER.decode(token_ids)


@settings(max_examples=30, deadline=None)
@given(token_ids=STREAMS)
def test_a_token_shows_at_once_every_character_that_it_completes(token_ids: list[int]) -> None:
    shown = ""
    for end, delta in enumerate(stream(TOKENIZER, token_ids)[:-1], start=1):
        shown += delta
        certain = TOKENIZER.decode(token_ids[:end]).rstrip("\ufffd")
        assert shown.startswith(certain)


@settings(max_examples=30, deadline=None)
@given(text=TEXTS)
def test_valid_text_never_shows_half_a_character(text: str) -> None:
    token_ids = TOKENIZER.encode(text)
    deltas = stream(TOKENIZER, token_ids)
    assert "".join(deltas).count("\ufffd") == text.count("\ufffd")
    if not text.endswith("\ufffd"):
        assert deltas[-1] == ""  # the last token completed it


def test_the_bytes_of_a_character_show_with_the_last_of_them() -> None:
    assert stream(TOKENIZER, EMOJI) == ["", "", "", "😀", ""]
    assert stream(TOKENIZER, [BOS, *EMOJI[:2], EOS, *EMOJI[2:]]) == ["", "", "", "", "", "😀", ""]


def test_half_a_character_at_the_end_is_shown_as_damaged() -> None:
    assert stream(TOKENIZER, [*TOKENIZER.encode("a")[1:], *EMOJI[:3]]) == ["a", "", "", "", "\ufffd"]


def test_bytes_that_are_no_text_are_not_held_for_ever() -> None:
    deltas = stream(TOKENIZER, [CONTINUATION] * 100)
    assert len("".join(deltas[:-1])) > 90


@settings(max_examples=30, deadline=None)
@given(token_ids=STREAMS, data=st.data())
def test_the_text_does_not_depend_on_how_many_tokens_come_at_once(token_ids: list[int], data: st.DataObject) -> None:
    detokenizer, text, rest = IncrementalDetokenizer(TOKENIZER, ()), "", token_ids
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        text += detokenizer.push(rest[:size]).text
        rest = rest[size:]
    assert text + detokenizer.finish().text == TOKENIZER.decode(token_ids)


@settings(max_examples=30, deadline=None)
@given(
    text=TEXTS.map(lambda text: text + "stop stopping 😀😀 end"),
    stop=st.lists(
        st.sampled_from(["stop", "stopping", "sto", "p s", "ing 😀", "😀", "😀😀", "end", "nd", "zz"]), max_size=3
    ),
)
def test_the_answer_ends_exactly_before_the_first_stop_string(text: str, stop: list[str]) -> None:
    detokenizer = IncrementalDetokenizer(TOKENIZER, stop)
    deltas = [detokenizer.push([token_id]) for token_id in TOKENIZER.encode(text)]
    deltas.append(detokenizer.finish())
    expected, stopped = cut_by_hand(text, stop)
    assert "".join(delta.text for delta in deltas) == expected
    assert deltas[-1].stopped == stopped
    flags = [delta.stopped for delta in deltas]
    assert flags == sorted(flags)  # once stopped, always stopped
    if stopped:
        assert all(delta.text == "" for delta in deltas[flags.index(True) + 1 :])


def test_a_stop_string_may_be_complete_only_with_the_end() -> None:
    detokenizer = IncrementalDetokenizer(TOKENIZER, ["b\ufffd"])
    assert detokenizer.push([*TOKENIZER.encode("ab")[1:], LEAD]).text == "a"
    last = detokenizer.finish()
    assert (last.text, last.stopped) == ("", True)


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="at least one character"):
        IncrementalDetokenizer(TOKENIZER, [""])


class _Counting:
    """A tokenizer that notes how many tokens each decode looks at."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def has_text(self, token_id: int) -> bool:
        return TOKENIZER.has_text(token_id)

    def decode(self, token_ids: Sequence[int]) -> str:
        self.sizes.append(len(token_ids))
        return TOKENIZER.decode(token_ids)


@pytest.mark.parametrize(
    "token_ids",
    [
        TOKENIZER.encode("A plain sentence with 😀 in it. ") * 50,
        [CONTINUATION] * 500,
        [LEAD] * 500,
        TOKENIZER.encode("\ufffd" * 200)[1:],
    ],
    ids=["text", "continuation bytes", "leading bytes", "replacement characters"],
)
def test_a_token_costs_the_same_wherever_it_stands(token_ids: list[int]) -> None:
    counting = _Counting()
    detokenizer = IncrementalDetokenizer(counting, ())
    for token_id in token_ids:
        detokenizer.push([token_id])
    assert max(counting.sizes) <= 24
    assert len(counting.sizes) <= 12 * len(token_ids)


# --- a tokenizer that marks the start of a word, and falls back to bytes ------------------------------------------

WORDS = ["▁", "▁Hello", "▁world", "ly", ",", "!", "▁a"]
FALLBACK = [f"<0x{byte:02X}>" for byte in range(256)]


@pytest.fixture(scope="module")
def sentencepiece_like(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    """As Llama's: a word's token carries the space before it, and the very first space is dropped."""
    directory: Path = tmp_path_factory.mktemp("sentencepiece")
    vocab = {token: i for i, token in enumerate(["<unk>", *WORDS, *FALLBACK])}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"unk_token": "<unk>"}))
    return ChatTokenizer.load(directory)


@settings(max_examples=30, deadline=None)
@given(parts=st.lists(st.sampled_from(WORDS) | st.sampled_from("é你😀"), max_size=10))
@example(parts=["▁", "▁Hello", "▁world"])
@example(parts=["▁", "▁", "▁"])
def test_spaces_between_words_survive_whatever_the_decoder_does_with_the_first(
    sentencepiece_like: ChatTokenizer, parts: list[str]
) -> None:
    token_ids: list[int] = []
    for part in parts:
        token_ids += [1 + WORDS.index(part)] if part in WORDS else [1 + len(WORDS) + byte for byte in part.encode()]
    text = "".join(parts).replace("▁", " ")
    assert "".join(stream(sentencepiece_like, token_ids)) == text.removeprefix(" ")
