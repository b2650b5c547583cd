"""What a system prompt costs that the prefix cache has: the time to the first token, at first and again.

python -m benchmarks.prefix_cache --model DIR --prompt 1000

Each round sends a new system prompt with a question behind it, the same one with another question, and a question
alone. Prints one line of JSON with medians in ms. `repeated` over `first` holds the question, whose tokens take a step
whatever stands before them; `system_prompt` is what the prompt itself adds to the question, again over at first.
"""

import dataclasses
import json
import random
import statistics
from pathlib import Path

import click

from benchmarks.engine import cell_spec, first_token
from benchmarks.workloads import Workload
from cluster.cell import Cell
from cluster.topology import Topology
from model_shards.config import load_model_config

_QUESTION = 16  # tokens


def measure(cell: Cell, prompt: int, rounds: int, vocab_size: int) -> dict[str, float]:
    """Medians over the rounds; the first round, which sizes buffers, does not count."""
    numbers = random.Random(0)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(numbers.randrange(vocab_size) for _ in range(count))

    seconds: dict[str, list[float]] = {"first": [], "repeated": [], "question": []}
    num_cached = 0
    for number in range(rounds + 1):
        system = tokens(prompt)
        first, _ = first_token(cell, f"first-{number}", system + tokens(_QUESTION), 1)
        repeated, output = first_token(cell, f"repeated-{number}", system + tokens(_QUESTION), 1)
        question, _ = first_token(cell, f"question-{number}", tokens(_QUESTION), 1)
        num_cached = output.num_cached_tokens
        if number:
            for name, value in zip(seconds, (first, repeated, question), strict=True):
                seconds[name].append(value)
    first, repeated, question = (statistics.median(values) for values in seconds.values())
    return {
        "first_ms": round(first * 1e3, 1),
        "repeated_ms": round(repeated * 1e3, 1),
        "question_ms": round(question * 1e3, 1),
        "cached_tokens": num_cached,
        "repeated": round(repeated / first, 3),
        "system_prompt": round((repeated - question) / (first - question), 3),
    }


@click.command()
@click.option("--model", required=True, type=click.Path(exists=True, path_type=Path, file_okay=False))
@click.option("--attention", default=1, show_default=True)
@click.option("--experts", default=2, show_default=True)
@click.option("--dtype", default="bfloat16", show_default=True)
@click.option("--prompt", default=1000, show_default=True, help="Tokens of the system prompt.")
@click.option("--rounds", default=7, show_default=True)
def main(model: Path, attention: int, experts: int, dtype: str, prompt: int, rounds: int) -> None:
    """Measures a cell; see the top of the file."""
    workload = Workload(2, prompt + _QUESTION, 1)
    spec = cell_spec(model.absolute(), Topology(attention, experts), dtype, "shm", "1", (workload,))
    spec = dataclasses.replace(spec, limits=dataclasses.replace(spec.limits, prefix_cache=True))
    with Cell(spec) as cell:
        report = measure(cell, prompt, rounds, load_model_config(model).vocab_size)
    click.echo(json.dumps({"prompt": prompt, "question": _QUESTION, **report}))


if __name__ == "__main__":
    main()
