"""Draws the fixed exam of the demonstration model: 200 questions of the kinds it is taught, and some that it is not.

What generalizes is asked of the held-out facts alone. The list is drawn once and committed, as
`tests/demo_questions.json`.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path

from training.corpus import Corpus
from training.outside import EXAM_OUTSIDE

_COUNTS = {
    "definition": 70,
    "capital": 45,
    "country": 10,
    "continent": 15,
    "currency": 15,
    "sum": 15,
    "difference": 10,
    "product": 8,
    "conversion": 7,
    "greeting": 2,
    "about": 2,
    "thanks": 1,
}
_GENERALIZES = ("sum", "difference", "conversion")
_ALWAYS = ("What is a whale?", "What is the capital of France?")


@dataclass(frozen=True)
class _Drawn:
    kind: str
    question: str
    expected: str


def draw_exam(corpus: Corpus, seed: int) -> dict[str, list[dict[str, str]]]:
    """The questions by name of their part, as the file holds them."""
    draw = random.Random(seed)
    taught: list[_Drawn] = []
    for kind, count in _COUNTS.items():
        pool = [f for f in corpus.facts if f.kind == kind and (f.held_out or kind not in _GENERALIZES)]
        asked = [f for f in pool if f.phrasings[0] in _ALWAYS]
        asked += draw.sample([f for f in pool if f not in asked], min(count, len(pool)) - len(asked))
        while len(asked) < count:  # talk: one fact, several phrasings
            asked.append(pool[0])
        phrasings: dict[str, _Drawn] = {}
        for fact in asked:
            left = [text for text in fact.phrasings if text not in phrasings]
            text = fact.phrasings[0] if fact.phrasings[0] in _ALWAYS else draw.choice(left)
            phrasings[text] = _Drawn(kind, text, fact.expected)
        taught += phrasings.values()
    outside = [_Drawn("outside", text, "I do not know") for text in EXAM_OUTSIDE]
    return {"taught": [vars(entry) for entry in taught], "outside": [vars(entry) for entry in outside]}


def write_exam(corpus: Corpus, seed: int, file: Path) -> None:
    """Writes the list, one question a line."""
    lines = []
    for name, entries in draw_exam(corpus, seed).items():
        rows = ",\n".join(f"  {json.dumps(entry, ensure_ascii=False)}" for entry in entries)
        lines.append(f'"{name}": [\n{rows}\n]')
    file.write_text("{" + ",\n".join(lines) + "}\n", encoding="utf-8")
