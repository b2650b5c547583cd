"""`shoal shard`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from model_shards.cut import CutReport
    from model_shards.quantization import Quantization


@click.command()
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    required=True,
    metavar="DIR",
    help="Checkpoint directory in Hugging Face layout.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    metavar="DIR",
    help="Where the cut checkpoint goes: a new or empty directory, or one that an earlier run has begun.",
)
@click.option(
    "--quantize",
    type=click.Choice(["int8", "fp8"]),
    help="Store the routed experts in one byte an element, one scale a row.  [default: as they are]",
)
def shard(model: Path, out: Path, quantize: str | None) -> None:
    """Cut a checkpoint by role and expert, so that each rank reads whole files of its own.

    Writes attention-*.safetensors, one expert-*.safetensors an expert, the files beside the weights, and shoal.json
    with a sum of every tensor, which a rank checks while it loads. Memory stays small whatever the checkpoint's
    size. Stopped or killed, the same command goes on where it was. Without --quantize the result is a Hugging Face
    checkpoint as before, in other files.

    \b
    shoal shard --model /models/DeepSeek-V2-Lite-Chat --out /models/lite-cut
    shoal shard --model /models/DeepSeek-V2-Chat --out /models/v2-int8 --quantize int8
    shoal serve --model /models/v2-int8 --device cuda --expert-shards 8

    The disk of --out needs the checkpoint's size, about half of it with --quantize; this is checked first.
    """
    from model_shards.quantization import Quantization

    quantization = None if quantize is None else Quantization(quantize)
    try:
        report = _cut_with_bar(model, out, quantization)
    except KeyboardInterrupt:
        click.echo("shoal: stopped; the same command goes on where it was", err=True)
        raise click.exceptions.Exit(1) from None
    if report.num_written < report.num_files:
        click.echo(f"shoal: {report.num_files - report.num_written} files stood there already", err=True)
    stored = "" if quantization is None else f", experts in {quantization.value}"
    size = f"{report.num_bytes / 1e9:.2f} GB" if report.num_bytes >= 1e9 else f"{report.num_bytes / 1e6:.2f} MB"
    click.echo(f"shoal: {out}: {report.num_files} files of weights, {size}{stored}")
    click.echo(f"shoal: next: shoal serve --model {out}", err=True)


def _cut_with_bar(model: Path, out: Path, quantization: Quantization | None) -> CutReport:
    """A bar on a terminal, nothing elsewhere. Raises ShoalError."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from model_shards.cut import cut_checkpoint

    console = Console(stderr=True)
    columns = (TextColumn("cutting"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    # stdout is not the bar's to draw on: it carries one line at the end.
    with Progress(
        *columns, console=console, transient=True, redirect_stdout=False, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("cutting", total=None)
        return cut_checkpoint(
            model, out, quantization, lambda done, total: bar.update(task, completed=done, total=total)
        )
