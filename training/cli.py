"""`python -m training.cli`: trains the checkpoint that comes with the package."""

import os
from pathlib import Path

import click
import torch
from rich.console import Console

from training.errors import TrainingError
from training.export import export_model
from training.recipe import Recipe, prepare, train
from training.sources import SourceError
from training.tokenizer import write_tokenizer


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--work",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path(".demo-model"),
    show_default=True,
    help="Sources, checkpoints and history. A run that was stopped goes on from what stands here.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path(".demo-model/shoal-demo"),
    show_default=True,
    help="Where the finished model goes, in Hugging Face layout.",
)
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
@click.option("--nice", default=10, show_default=True, help="Lowers this process's priority by so much.")
def main(work: Path, out: Path, device: str, nice: int) -> None:
    """Train the small checkpoint that `shoal serve` uses when none is named."""
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


if __name__ == "__main__":
    main()
