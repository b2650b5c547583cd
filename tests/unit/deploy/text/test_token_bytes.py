"""Single tokens as bytes and as names, for the kinds of tokenizers that checkpoints come with."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers.convert_slow_tokenizer import bytes_to_unicode

from deploy.models import default_model_directory
from deploy.text import ChatTokenizer
from deploy.text.token_bytes import TokenBytes

TOKENIZER = ChatTokenizer.load(default_model_directory())
EOS = TOKENIZER.eos_token_ids[0]


def bpe(pieces, decoder, added=()):
    """A tokenizer with these pieces as tokens 0, 1, ... and the added ones behind them."""
    tokenizer = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, []))
    if decoder is not None:
        tokenizer.decoder = decoder
    tokenizer.add_tokens([AddedToken(text, special=special) for text, special in added])
    return TokenBytes(tokenizer)


def sentencepiece(pieces, added=()):
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return bpe(pieces, decoders.Sequence(steps), added)


@settings(max_examples=50, deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20))
def test_the_bytes_of_a_texts_tokens_are_the_texts_bytes(text):
    ids = TOKENIZER.encode(text)[1:]
    assert b"".join(TOKENIZER.token_bytes(token_id) for token_id in ids) == text.encode()


def test_every_token_has_a_text_of_its_own():
    ids = range(TOKENIZER.vocab_size + 3)
    assert len({TOKENIZER.token_text(token_id) for token_id in ids}) == len(ids)


def test_every_byte_has_its_character_of_a_byte_level_vocabulary():
    alphabet = bytes_to_unicode()
    tokens = bpe(alphabet.values(), decoders.ByteLevel())
    assert [tokens.bytes_of(index) for index in range(256)] == [bytes([byte]) for byte in alphabet]


def test_half_a_character_is_written_as_its_bytes():
    ids = TOKENIZER.encode("🐋")[1:]
    assert len(ids) > 1
    names = [TOKENIZER.token_text(token_id) for token_id in ids]
    assert "".join(name.removeprefix("bytes:") for name in names) == "\\xf0\\x9f\\x90\\x8b"
    assert all(name.startswith("bytes:") for name in names)


def test_a_special_token_is_its_own_text():
    assert TOKENIZER.token_text(EOS) == "<｜end▁of▁sentence｜>"
    assert TOKENIZER.token_bytes(EOS) == "<｜end▁of▁sentence｜>".encode()


@pytest.mark.parametrize("token_id", [TOKENIZER.vocab_size, TOKENIZER.vocab_size + 7, 2**31 - 1])
def test_an_id_without_a_token_has_no_bytes_and_is_named_by_its_number(token_id):
    assert TOKENIZER.token_bytes(token_id) == b""
    assert TOKENIZER.token_text(token_id) == f"token_id:{token_id}"


def test_a_byte_level_vocabulary_inside_a_sequence_counts_and_added_tokens_keep_their_text():
    steps = decoders.Sequence([decoders.Fuse(), decoders.ByteLevel()])
    tokens = bpe(["Ġdas", "Ã", "¶"], steps, [("Ġraw", False), ("<mask>", True)])
    assert [tokens.bytes_of(index) for index in range(5)] == [b" das", b"\xc3", b"\xb6", "Ġraw".encode(), b"<mask>"]


def test_a_byte_of_a_byte_fallback_is_a_byte_and_not_the_token_of_its_character():
    tokens = sentencepiece(["▁whale", "A", "<0x41>", "<0xF0>", "<0xZZ>", "鯨"], [("<0x42>", False)])
    assert [tokens.bytes_of(index) for index in range(7)] == [
        b" whale",
        b"A",
        b"A",
        b"\xf0",
        b"<0xZZ>",
        "鯨".encode(),
        b"<0x42>",
    ]
    names = [tokens.text_of(index) for index in range(7)]
    assert names == [" whale", "A", "bytes:\\x41", "bytes:\\xf0", "<0xZZ>", "鯨", "<0x42>"]


def test_a_metaspace_is_a_space():
    tokens = bpe(["▁whale", "s", "<0x41>"], decoders.Metaspace())
    assert [tokens.bytes_of(index) for index in range(3)] == [b" whale", b"s", b"<0x41>"]


@pytest.mark.parametrize(("decoder", "text"), [(None, "##s"), (decoders.WordPiece(), "##s"), (decoders.Fuse(), "##s")])
def test_other_tokens_are_what_they_decode_to_alone(decoder, text):
    assert bpe(["whale", "##s"], decoder).text_of(1) == text
