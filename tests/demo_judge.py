"""Whether an answer of the demonstration model is readable and right, judged by the data it was taught from.

`tests/demo_questions.json` holds the questions, fixed: kind, question, and what a right answer must say.
"""

import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

QUESTIONS_FILE = Path(__file__).parent / "demo_questions.json"
# A definition is right when it shares most of its words with WordNet's, word for word counted.
_DEFINITION_OVERLAP = 0.75
_LONGEST_ANSWER = 60  # words
_NUMBER_KINDS = ("sum", "difference", "product", "conversion")


@dataclass(frozen=True)
class Question:
    """One question of the exam."""

    kind: str
    question: str
    expected: str


@dataclass(frozen=True)
class Exam:
    """Questions it was trained for, and questions it was not."""

    taught: tuple[Question, ...]
    outside: tuple[Question, ...]


def read_exam(file: Path = QUESTIONS_FILE) -> Exam:
    """The fixed list."""
    parts = json.loads(file.read_text(encoding="utf-8"))
    taught, outside = (tuple(Question(**entry) for entry in parts[name]) for name in ("taught", "outside"))
    return Exam(taught, outside)


def words_of(text: str) -> list[str]:
    """Lower-case words and numbers."""
    return re.findall(r"\w+", text.lower())


def overlap(first: str, second: str) -> float:
    """F1 of the words of two texts, each counted as often as it stands."""
    left, right = Counter(words_of(first)), Counter(words_of(second))
    shared = sum((left & right).values())
    return 2 * shared / max(1, sum(left.values()) + sum(right.values()))


def is_readable(answer: str) -> bool:
    """One short piece of printable text that ends as a sentence does and does not stammer."""
    words = words_of(answer)
    stammers = any(words[i] == words[i + 1] == words[i + 2] for i in range(len(words) - 2))
    ended = answer.rstrip().endswith((".", "!", "?"))
    return 1 <= len(words) <= _LONGEST_ANSWER and answer.replace("\n", " ").isprintable() and ended and not stammers


def is_right(question: Question, answer: str) -> bool:
    """Readable, and says what is expected."""
    if not is_readable(answer):
        return False
    if question.kind == "definition":
        said = answer.partition(" is ")[2]
        return overlap(said, question.expected) >= _DEFINITION_OVERLAP
    if question.kind in _NUMBER_KINDS:
        # The last number is the result; the others repeat the question.
        numbers = [word for word in words_of(answer) if word.isdigit()]
        return bool(numbers) and numbers[-1] == question.expected
    expected, said = words_of(question.expected), words_of(answer)
    return any(said[at : at + len(expected)] == expected for at in range(len(said) - len(expected) + 1))
