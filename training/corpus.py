"""The training text and how it is cut into batches. The split into training and held-out comes before anything else.

    pre-training   plain text: glosses of WordNet, and the facts as statements     windows of one long token stream
    fine-tuning    one question and its answer, in the chat format                 loss on the answer alone

A batch is a pure function of (seed, phase, step), so a run that goes on after a kill sees the same batches.
"""

import functools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from training import questions, sources
from training.batch import IGNORED, Batch
from training.outside import WordLists, outside, word_lists
from training.questions import Fact
from training.tokenizer import BOS_ID, EOS_ID, answer_text, prompt_text

_GLOSS_WORDS = (4, 24)
# How often a kind of question is asked in fine-tuning.
_SHARES = {
    "definition": 0.28,
    "capital": 0.10,
    "country": 0.05,
    "continent": 0.04,
    "currency": 0.06,
    "sum": 0.13,
    "difference": 0.10,
    "product": 0.02,
    "conversion": 0.05,
    "talk": 0.03,
    "outside": 0.14,
}
# How often a statement stands in the text of pre-training.
_REPEATED = {"definition": 6, "capital": 6, "country": 6, "currency": 6, "sum": 3, "difference": 3}
_SORTED_TOGETHER = 4  # steps
_TALK = ("greeting", "about", "thanks", "bye")


@dataclass(frozen=True)
class Corpus:
    """All text, split."""

    facts: tuple[Fact, ...]
    words: WordLists
    glosses: tuple[str, ...]  # of the training split
    held_out_glosses: tuple[str, ...]

    @property
    def taught(self) -> tuple[Fact, ...]:
        """Facts of the training split."""
        return tuple(fact for fact in self.facts if not fact.held_out)

    @property
    def held_out(self) -> tuple[Fact, ...]:
        """Facts that only a model that generalizes can know."""
        return tuple(fact for fact in self.facts if fact.held_out)


def read_corpus(work: Path) -> Corpus:
    """Reads the sources. Raises SourceError when one cannot be had."""
    wordnet = sources.fetch_wordnet(work)
    senses = sources.read_wordnet(wordnet)
    countries = sources.read_countries()
    facts = [
        *questions.definitions(senses),
        *questions.geography(countries),
        *questions.arithmetic(),
        *questions.conversions(),
        *questions.talk(),
    ]
    least, most = _GLOSS_WORDS
    glosses: dict[str, str] = {}  # text -> its definition
    for sense in senses:
        if least <= len(sense.definition.split()) <= most:
            text = f"{sense.lemma}: {sense.definition}." + "".join(f" {example}." for example in sense.examples[:1])
            glosses[text] = sense.definition
    # A definition that is taught stands in the training text as an answer, wherever its gloss falls.
    taught = {fact.expected for fact in facts if fact.kind == "definition"}
    train = tuple(text for text in glosses if not questions.is_held_out(text.partition(": ")[2]))
    held_out = tuple(
        text
        for text, definition in glosses.items()
        if questions.is_held_out(text.partition(": ")[2]) and definition not in taught
    )
    return Corpus(tuple(facts), word_lists(senses, countries, sources.read_names(wordnet)), train, held_out)


def tokenizer_texts(corpus: Corpus) -> list[str]:
    """What the tokenizer is trained on: the training split, facts more than once since they are what is asked."""
    asked = [prompt_text(text) + answer_text(fact.answer) for fact in corpus.taught for text in fact.phrasings[:3]]
    return [*corpus.glosses[::2], *asked]


def statement(fact: Fact) -> str:
    """A fact as plain text for pre-training."""
    return fact.answer


def token_stream(tokenizer: Tokenizer, texts: Sequence[str]) -> np.ndarray:
    """[n] int32: begin token, text, end token, one after another."""
    pieces: list[int] = []
    for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=False):
        pieces += [BOS_ID, *encoding.ids, EOS_ID]
    return np.array(pieces, dtype=np.int32)


def pretraining_stream(corpus: Corpus, tokenizer: Tokenizer, seed: int) -> np.ndarray:
    """All training documents in an order of the seed; facts stand in it several times, glosses once."""
    facts = [fact for fact in corpus.taught if fact.kind not in _TALK]
    texts = [*corpus.glosses, *(statement(fact) for fact in facts for _ in range(_REPEATED.get(fact.kind, 1)))]
    random.Random(seed).shuffle(texts)
    return token_stream(tokenizer, texts)


def held_out_stream(corpus: Corpus, tokenizer: Tokenizer) -> np.ndarray:
    """Held-out glosses and held-out facts as statements, in the shares that training has."""
    glosses = corpus.held_out_glosses[::20]
    return token_stream(
        tokenizer, [*glosses, *(statement(fact) for fact in corpus.held_out[:: len(corpus.held_out) // 300])]
    )


def pretraining_batches(stream: np.ndarray, size: int, length: int, seed: int) -> Callable[[int], Batch]:
    """Windows of `length` tokens, each epoch a new order of them."""
    windows = (len(stream) - 1) // length

    def batch(step: int) -> Batch:
        rows = []
        for position in range(step * size, (step + 1) * size):
            epoch, index = divmod(position, windows)
            start = int(_order(seed, epoch, windows)[index]) * length
            rows.append(stream[start : start + length + 1].astype(np.int64))
        tokens = torch.from_numpy(np.stack(rows))
        return Batch(tokens[:, :-1], tokens[:, 1:], torch.ones(size, length, dtype=torch.bool))

    return batch


_orders: dict[tuple[int, int, int], np.ndarray] = {}


def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    key = (seed, epoch, count)
    if key not in _orders:
        _orders.clear()
        _orders[key] = np.random.default_rng((seed, epoch)).permutation(count)
    return _orders[key]


def tuning_batches(corpus: Corpus, tokenizer: Tokenizer, size: int, seed: int) -> Callable[[int], Batch]:
    """Questions drawn by `_SHARES`, each with one of its phrasings; padded to the longest of the batch.

    Those of `_SORTED_TOGETHER` neighbouring steps are drawn at once and dealt out by their length, which halves the
    padding.
    """
    by_kind: dict[str, list[Fact]] = {kind: [] for kind in _SHARES}
    for fact in corpus.taught:
        by_kind["talk" if fact.kind in _TALK else fact.kind].append(fact)
    kinds, weights = list(_SHARES), list(_SHARES.values())

    @functools.lru_cache(maxsize=2)
    def drawn(group: int) -> list[tuple[str, str]]:
        draw = random.Random(f"{seed}/{group}")
        pairs = []
        for kind in draw.choices(kinds, weights, k=size * _SORTED_TOGETHER):
            fact = outside(corpus.words, draw) if kind == "outside" else draw.choice(by_kind[kind])
            pairs.append((draw.choice(fact.phrasings), fact.answer))
        return sorted(pairs, key=lambda pair: len(pair[0]) + len(pair[1]))

    def batch(step: int) -> Batch:
        group, place = divmod(step, _SORTED_TOGETHER)
        # Not always the shortest first: neighbouring steps would drift together.
        place = (place * 3 + group) % _SORTED_TOGETHER
        return encode_pairs(tokenizer, drawn(group)[place * size : (place + 1) * size])

    return batch


def with_text(batches: Callable[[int], Batch], stream: np.ndarray, count: int, seed: int) -> Callable[[int], Batch]:
    """Each batch with `count` pieces of the stream, as long as its longest sequence, behind it."""

    def batch(step: int) -> Batch:
        asked = batches(step)
        length = asked.input_ids.shape[1]
        starts = np.random.default_rng((seed, step)).integers(0, len(stream) - length - 1, size=count)
        tokens = torch.from_numpy(np.stack([stream[start : start + length + 1].astype(np.int64) for start in starts]))
        return Batch(
            torch.cat((asked.input_ids, tokens[:, :-1])),
            torch.cat((asked.labels, tokens[:, 1:])),
            torch.cat((asked.mask, torch.ones(count, length, dtype=torch.bool))),
        )

    return batch


def encode_pairs(tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]]) -> Batch:
    """(question, answer) in the chat format; the loss is on the answer and the end token."""
    prompts = tokenizer.encode_batch([prompt_text(question) for question, _ in pairs], add_special_tokens=False)
    answers = tokenizer.encode_batch([answer_text(answer) for _, answer in pairs], add_special_tokens=False)
    rows = [([BOS_ID, *p.ids], [*a.ids, EOS_ID]) for p, a in zip(prompts, answers, strict=True)]
    length = max(len(prompt) + len(answer) for prompt, answer in rows) - 1
    input_ids = torch.full((len(rows), length), EOS_ID, dtype=torch.int64)
    labels = torch.full((len(rows), length), IGNORED, dtype=torch.int64)
    mask = torch.zeros((len(rows), length), dtype=torch.bool)
    for row, (prompt, answer) in enumerate(rows):
        tokens = torch.tensor([*prompt, *answer])
        count = len(tokens) - 1
        input_ids[row, :count] = tokens[:-1]
        labels[row, len(prompt) - 1 : count] = tokens[len(prompt) :]
        mask[row, :count] = True
    return Batch(input_ids, labels, mask)
