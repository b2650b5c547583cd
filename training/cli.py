"""`make train-demo-model`: trains the checkpoint that comes with the package, then writes its card."""

import os
from pathlib import Path

import click
import torch
from rich.console import Console
from transformers import DeepseekV2ForCausalLM

from training.card import CARD_FILE, LOAD_FILE, LOSSES_FILE, model_card, read_scores
from training.checkpoint import read_history
from training.errors import TrainingError
from training.evaluate import evaluate
from training.export import export_model
from training.plots import plot_expert_load, plot_losses
from training.recipe import Recipe, prepare, train
from training.sources import SourceError
from training.tokenizer import write_tokenizer

_work = click.option(
    "--work",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path(".demo-model"),
    show_default=True,
    help="Sources, checkpoints and history. A run that was stopped goes on from what stands here.",
)
_out = click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path(".demo-model/shoal-demo"),
    show_default=True,
    help="The finished model, in Hugging Face layout.",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Make the small checkpoint that `shoal serve` uses when none is named."""


@main.command("train")
@_work
@_out
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
@click.option("--nice", default=10, show_default=True, help="Lowers this process's priority by so much.")
def train_command(work: Path, out: Path, device: str, nice: int) -> None:
    """Train it: an hour and a quarter on 2 quiet cores."""
    os.nice(nice)
    torch.set_num_threads(os.cpu_count() or 1)
    console = Console(stderr=True)
    recipe = Recipe()
    try:
        console.print("reading the sources and the tokenizer")
        prepared = prepare(recipe, work)
        model = train(recipe, prepared, work, torch.device(device), console)
    except (SourceError, TrainingError) as error:
        raise click.ClickException(str(error)) from error
    export_model(model, out)
    write_tokenizer(prepared.tokenizer, out, model.config.max_position_embeddings)
    console.print(f"written to {out}")


@main.command("card")
@_work
@_out
@click.option(
    "--scores",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    default=Path(".demo-model/exam.json"),
    show_default=True,
    help="Right answers by kind, as `python -m tests.demo_exam` writes them.",
)
def card_command(work: Path, out: Path, scores: Path) -> None:
    """Measure the finished model and write its card and pictures beside it."""
    torch.set_num_threads(os.cpu_count() or 1)
    recipe = Recipe()
    prepared = prepare(recipe, work)
    # As it is shipped, rounded to bf16, and not as training left it.
    model = DeepseekV2ForCausalLM.from_pretrained(out, dtype=torch.float32)
    figures = evaluate(model, recipe, prepared)
    history = read_history(work)
    plot_losses(history, out / LOSSES_FILE)
    plot_expert_load([load.shares for load in figures.loads], [load.layer for load in figures.loads], out / LOAD_FILE)
    card = model_card(recipe, prepared.corpus, history, figures, read_scores(scores))
    (out / CARD_FILE).write_text(card, encoding="utf-8")
    for file in (CARD_FILE, LOSSES_FILE, LOAD_FILE):
        (out / file).chmod(0o644)


if __name__ == "__main__":
    main()
