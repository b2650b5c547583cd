"""Stop strings in a stream of text."""

from collections.abc import Sequence
from dataclasses import dataclass

from model_shards.errors import InvalidRequestError


@dataclass(frozen=True)
class TextDelta:
    """What a push adds to the answer. After `stopped` the answer is complete and every later delta is empty."""

    text: str
    stopped: bool


class StopStrings:
    """Passes text on up to the first stop string, which is not passed on.

    The first is the one that is complete first; of two complete at once, the longer. So the answer does not depend on
    how the stream is cut. Only the longest end of the text that may begin a stop string is held back:

        stop "</end>"     push "a <"  -> "a "      push "/en"  -> ""      push "x"  -> "</enx"
    """

    def __init__(self, stop: Sequence[str]) -> None:
        """Raises InvalidRequestError for an empty string: every text contains it."""
        if not all(stop):
            raise InvalidRequestError("a stop string must have at least one character, got an empty one")
        self._stop = tuple(stop)
        self._held = ""
        self._stopped = False

    def push(self, text: str) -> TextDelta:
        """Takes the next piece of text."""
        if self._stopped:
            return TextDelta("", True)
        text = self._held + text
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self._stopped, self._held = True, ""
            return TextDelta(text[: min(found)[1]], True)
        keep = self._held_from(text)
        self._held = text[keep:]
        return TextDelta(text[:keep], False)

    def finish(self) -> TextDelta:
        """Gives back what is held: no more text comes."""
        text, self._held = self._held, ""
        return TextDelta(text, self._stopped)

    def _held_from(self, text: str) -> int:
        """Where the longest end of the text that begins a stop string starts."""
        start = len(text)
        for stop in self._stop:
            at = text.find(stop[0], max(0, len(text) - len(stop) + 1))
            while 0 <= at < start and not stop.startswith(text[at:]):
                at = text.find(stop[0], at + 1)
            if at >= 0:
                start = min(start, at)
        return start
