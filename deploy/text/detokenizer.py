"""Tokens to text while they stream.

A token is not a text: a character may span tokens, and some decoders look at a token's neighbours (a leading space
belongs to the word after it). So each token is decoded behind the ones of the last piece, and what is new is passed on
up to the last complete character:

    ids      [ context | pending ]        context: shown already, kept for the decoder's sake
    decoded  "wor"     "ld \ufffd"        passed on: "ld "; the rest waits for the next bytes of its character

When the decoded end is a complete character, pending becomes the context and the context is forgotten. The window
stays a few tokens long, so a token costs the same wherever it stands in the answer.
"""

from collections.abc import Sequence

from deploy.text.stop import StopStrings, TextDelta
from deploy.text.tokenizer import ChatTokenizer

_REPLACEMENT = "\ufffd"
# A character has at most 4 bytes and a token at least one: bytes this many tokens back complete no character to come.
_MAX_CHARACTER_TOKENS = 3
# Pending tokens past which bytes that are no UTF-8 are taken for what they are, and not for half a character.
_MAX_PENDING = 6


class IncrementalDetokenizer:
    """Text of one answer. Never splits a character; holds back what may begin a stop string."""

    def __init__(self, tokenizer: ChatTokenizer, stop: Sequence[str]) -> None:
        """Raises InvalidRequestError for an empty stop string."""
        self._tokenizer = tokenizer
        self._window = _Window(tokenizer)
        self._stop = StopStrings(stop)
        self._num_characters = 0

    @property
    def num_characters(self) -> int:
        """Whole characters so far, those held back and those of a stop string included: where the next token begins."""
        return self._num_characters

    def push(self, token_ids: Sequence[int]) -> TextDelta:
        """Text that the next tokens make certain. Special tokens and ids without a token have none."""
        pieces = [self._window.push(token_id) for token_id in token_ids if self._tokenizer.has_text(token_id)]
        text = "".join(pieces)
        self._num_characters += len(text)
        return self._stop.push(text)

    def finish(self) -> TextDelta:
        """The rest: no more tokens come. Half a character becomes U+FFFD. `stopped` if that completes a stop string."""
        last = self._stop.push(self._window.finish())
        return TextDelta(last.text + self._stop.finish().text, last.stopped)


class _Window:
    """The last few tokens, and how much of their text was passed on."""

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._context = 0  # how many of the ids are context
        self._shown = 0  # characters of the decoded ids that were passed on

    def push(self, token_id: int) -> str:
        """The characters that this token completes."""
        self._ids.append(token_id)
        text = self._tokenizer.decode(self._ids)
        certain = text.rstrip(_REPLACEMENT)
        new = certain[self._shown :]
        self._shown = max(self._shown, len(certain))
        if len(certain) < len(text):
            if len(self._ids) - self._context > _MAX_PENDING:
                new += self._give_up_bytes(text)
        elif new:
            # Only where it showed something: a decoder that drops the very first space needs it kept until a word came.
            self._ids = self._ids[self._context :]
            self._context = len(self._ids)
            self._shown = len(self._tokenizer.decode(self._ids))
        return new

    def finish(self) -> str:
        """Everything not passed on yet."""
        rest = self._tokenizer.decode(self._ids)[self._shown :]
        self._ids, self._context, self._shown = [], 0, 0
        return rest

    def _give_up_bytes(self, text: str) -> str:
        """Text of the front of the window, cut off where no character spans the cut; empty when there is none.

        Decoding both parts apart gives the same text only if nothing joins across the cut, and enough tokens stay
        behind it that no byte to come can change that.
        """
        last = len(self._ids) - _MAX_CHARACTER_TOKENS
        for cut in range(last, max(0, last - _MAX_CHARACTER_TOKENS - 1), -1):
            front = self._tokenizer.decode(self._ids[:cut])
            if front + self._tokenizer.decode(self._ids[cut:]) == text:
                rest = front[self._shown :]
                self._ids, self._context = self._ids[cut:], 0
                self._shown = max(0, self._shown - len(front))
                return rest
        return ""
