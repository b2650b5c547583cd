"""The whole run: data, two phases, and what is measured while it trains."""

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from tokenizers import Tokenizer
from transformers import DeepseekV2ForCausalLM

from training.batch import IGNORED, Batch, TrainPhase
from training.corpus import (
    Corpus,
    encode_pairs,
    held_out_stream,
    pretraining_batches,
    pretraining_stream,
    read_corpus,
    tokenizer_texts,
    tuning_batches,
    with_text,
)
from training.export import export_model
from training.model import build_model, demo_config
from training.tokenizer import BOS_ID, EOS_ID, train_tokenizer
from training.trainer import Trainer, next_token_loss

_HELD_OUT_WINDOWS = 64
_HELD_OUT_QUESTIONS = 256


@dataclass(frozen=True)
class Recipe:
    """The settings that make the model what it is; together with the sources they give the same weights again."""

    seed: int = 7
    vocab_size: int = 4096
    window: int = 128  # tokens
    windows_per_step: int = 16
    pretraining_steps: int = 2400
    pretraining_lr: float = 2e-3
    questions_per_step: int = 48
    texts_per_step: int = 16  # pieces of plain text among the questions, against forgetting
    tuning_steps: int = 1400
    tuning_lr: float = 1e-3
    warmup_steps: int = 100


@dataclass(frozen=True)
class Prepared:
    """Corpus, tokenizer and streams of a recipe."""

    corpus: Corpus
    tokenizer: Tokenizer
    stream: np.ndarray  # [n] int32, pre-training
    held_out: np.ndarray  # [m] int32


def prepare(recipe: Recipe, work: Path) -> Prepared:
    """Reads the sources and trains the tokenizer; both are kept in `work`. Raises SourceError."""
    corpus = read_corpus(work)
    stored = work / "tokenizer.json"
    if stored.exists():
        tokenizer = Tokenizer.from_file(str(stored))
    else:
        tokenizer = train_tokenizer(tokenizer_texts(corpus), recipe.vocab_size)
        tokenizer.save(str(stored))
    stream = pretraining_stream(corpus, tokenizer, recipe.seed)
    return Prepared(corpus, tokenizer, stream, held_out_stream(corpus, tokenizer))


def train(
    recipe: Recipe, prepared: Prepared, work: Path, device: torch.device, console: Console
) -> DeepseekV2ForCausalLM:
    """Trains a model, or goes on where a run in `work` stopped. Raises what `Trainer.run` raises.

    Fine-tuning starts from the exported base model in `work/base`, rounded to bf16 as it would be published.
    """
    config = demo_config(recipe.vocab_size, BOS_ID, EOS_ID)
    model = build_model(config, recipe.seed).to(device)
    data = hashlib.sha256(prepared.stream.tobytes() + repr(asdict(recipe)).encode()).hexdigest()
    trainer = Trainer(model, work, data, held_out=_held_out(prepared, recipe.window), console=console)
    pretraining, tuning = phases(recipe, prepared)
    trainer.run(pretraining)
    if trainer.state.phase != tuning.name:
        base = work / "base"
        export_model(model, base)
        model.load_state_dict(DeepseekV2ForCausalLM.from_pretrained(base, dtype=torch.float32).state_dict())
    trainer.run(tuning)
    return model


def phases(recipe: Recipe, prepared: Prepared) -> tuple[TrainPhase, TrainPhase]:
    """Pre-training, then supervised fine-tuning."""
    text = pretraining_batches(prepared.stream, recipe.windows_per_step, recipe.window, recipe.seed)
    questions = tuning_batches(prepared.corpus, prepared.tokenizer, recipe.questions_per_step, recipe.seed)
    chat = with_text(questions, prepared.stream, recipe.texts_per_step, recipe.seed)
    return (
        TrainPhase("pre-training", recipe.pretraining_steps, recipe.pretraining_lr, recipe.warmup_steps, text),
        TrainPhase("fine-tuning", recipe.tuning_steps, recipe.tuning_lr, recipe.warmup_steps, chat),
    )


def _held_out(prepared: Prepared, window: int) -> Callable[[DeepseekV2ForCausalLM], dict[str, float]]:
    text = pretraining_batches(prepared.held_out, _HELD_OUT_WINDOWS, window, seed=0)(0)
    facts = prepared.corpus.held_out
    chosen = facts[:: max(1, len(facts) // _HELD_OUT_QUESTIONS)]
    asked = encode_pairs(prepared.tokenizer, [(fact.phrasings[0], fact.answer) for fact in chosen])

    def losses(model: DeepseekV2ForCausalLM) -> dict[str, float]:
        return {"text": batch_loss(model, text), "questions": batch_loss(model, asked)}

    return losses


def batch_loss(model: DeepseekV2ForCausalLM, batch: Batch, size: int = 16) -> float:
    """Mean loss over a large batch, `size` sequences at a time, in nats a supervised token."""
    device = next(model.parameters()).device
    total, count = 0.0, 0
    for start in range(0, batch.input_ids.shape[0], size):
        rows = slice(start, start + size)
        labels = batch.labels[rows]
        supervised = int((labels != IGNORED).sum())
        loss = next_token_loss(model, batch.input_ids[rows].to(device), labels.to(device))
        total, count = total + float(loss) * supervised, count + supervised
    return total / count
