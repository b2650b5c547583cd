"""Stop strings the slow way: look at every character as it comes."""

from collections.abc import Sequence


def cut_by_hand(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """The text up to the stop string that is complete first, the longest of those complete at once; whether one is."""
    for end in range(1, len(text) + 1):
        complete = [word for word in stop if text[:end].endswith(word)]
        if complete:
            return text[: end - max(map(len, complete))], True
    return text, False


def length_of_begun_stop(text: str, stop: Sequence[str]) -> int:
    """Characters of the longest end of the text that begins a stop string."""
    begun = [n for word in stop for n in range(len(word)) if text.endswith(word[:n])]
    return max(begun, default=0)
