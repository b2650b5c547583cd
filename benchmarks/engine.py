"""Tokens per second of a whole cell of plain processes: the engine alone, without Ray and the gateway.

python -m benchmarks.engine --model DIR --attention 1 --experts 2 --transport shm,gloo

Transports are run in turn, `--rounds` times each, and every run prints one line of JSON; then come the medians.
"""

import statistics
import time
from collections import defaultdict
from itertools import product
from pathlib import Path

import click

from benchmarks.workloads import WORKLOADS, Timing, Workload
from cluster.cell import Cell
from cluster.limits import MAX_MICRO_BATCHES, EngineLimits
from cluster.request import GenerationRequest, StepOutput
from cluster.spec import CellSpec
from cluster.topology import Topology
from model_shards.config import load_model_config
from model_shards.sampling import SamplingParams

_BLOCK_SIZE = 16
_TIMEOUT_S = 600.0


def submit_workload(cell: Cell, num_attention: int, workload: Workload, vocab_size: int, name: str) -> None:
    """All prompts at once, dealt round robin to the replicas."""
    for index, prompt in enumerate(workload.prompts(vocab_size)):
        request = GenerationRequest(
            f"{name}-{index}", prompt, workload.output_tokens, SamplingParams(0.0), ignore_eos=True
        )
        cell.submit(index % num_attention, request)


def run_workload(cell: Cell, num_attention: int, workload: Workload, vocab_size: int, name: str) -> Timing:
    """From the first prompt in to the last token out."""
    begun = time.perf_counter()
    submit_workload(cell, num_attention, workload, vocab_size, name)
    started: set[str] = set()
    prefilled, left = begun, workload.num_sequences
    for output in cell.outputs(_TIMEOUT_S):
        if output.request_id not in started:
            started.add(output.request_id)
            prefilled = time.perf_counter()
        if output.finish_reason is not None:
            left -= 1
            if not left:
                break
    return Timing(time.perf_counter() - begun, prefilled - begun)


def first_token(cell: Cell, name: str, prompt: tuple[int, ...], output_tokens: int) -> tuple[float, StepOutput]:
    """Seconds to the first output of a request to the first replica, and that output; it is then read to its end."""
    begun = time.perf_counter()
    cell.submit(0, GenerationRequest(name, prompt, output_tokens, SamplingParams(0.0), ignore_eos=True))
    first: tuple[float, StepOutput] | None = None
    for output in cell.outputs(_TIMEOUT_S):
        first = first or (time.perf_counter() - begun, output)
        if output.finish_reason is not None:
            return first
    raise AssertionError("outputs end only by an exception")


def cell_spec(
    model: Path,
    topology: Topology,
    dtype: str,
    transport: str,
    micro_batches: str,
    workloads: tuple[Workload, ...],
    attention_weights: str = "auto",
) -> CellSpec:
    """A cell with room for the largest workload; `micro_batches` is a number, or auto."""
    longest = max(workload.prompt_tokens + workload.output_tokens for workload in workloads)
    most = max(workload.num_sequences for workload in workloads)
    blocks = -(-longest // _BLOCK_SIZE) * most + most
    limits = EngineLimits(
        max_model_len=longest,
        max_num_seqs=most,
        max_num_batched_tokens=2048,
        block_size=_BLOCK_SIZE,
        num_blocks=blocks,
        num_micro_batches=MAX_MICRO_BATCHES if micro_batches == "auto" else int(micro_batches),
        choose_micro_batches=micro_batches == "auto",
        prefix_cache=False,
    )
    return CellSpec(
        str(model),
        topology,
        "cpu",
        dtype,
        limits,
        attention_weights=attention_weights,
        data_backend=transport,
        log_level="WARNING",
    )


@click.command()
@click.option("--model", type=click.Path(exists=True, path_type=Path, file_okay=False), required=True)
@click.option("--attention", default=1, show_default=True)
@click.option("--experts", default=2, show_default=True)
@click.option("--dtype", default="bfloat16", show_default=True)
@click.option("--attention-weights", default="auto", show_default=True, help="One or several of auto, int8.")
@click.option("--transport", default="shm", show_default=True, help="One or several of shm, gloo.")
@click.option("--micro-batches", default="auto", show_default=True, help="One or several of auto, 1, 2, 3.")
@click.option("--workload", "texts", multiple=True, help="SEQUENCES,PROMPT,OUTPUT; those of the peers if not given.")
@click.option("--rounds", default=3, show_default=True)
def main(
    model: Path,
    attention: int,
    experts: int,
    dtype: str,
    attention_weights: str,
    transport: str,
    micro_batches: str,
    texts: tuple[str, ...],
    rounds: int,
) -> None:
    """Measures a cell; see the top of the file."""
    workloads = tuple(map(Workload.parse, texts)) or WORKLOADS
    vocab_size = load_model_config(model).vocab_size
    topology = Topology(attention, experts)
    rates: dict[tuple[str, Workload], list[float]] = defaultdict(list)
    for number in range(rounds):
        for kind, count, weights in product(
            transport.split(","), micro_batches.split(","), attention_weights.split(",")
        ):
            name = f"shoal {attention}x{experts} {dtype} {kind} {count} micro-batches"
            name += "" if weights == "auto" else f" {weights} attention"
            with Cell(cell_spec(model, topology, dtype, kind, count, workloads, weights)) as cell:
                run_workload(cell, attention, Workload(1, 8, 4), vocab_size, "warm")
                for workload in workloads:
                    timing = run_workload(cell, attention, workload, vocab_size, f"{number}-{workload}")
                    click.echo(timing.line(name, workload))
                    total = workload.num_sequences * workload.output_tokens
                    rates[name, workload].append(total / timing.seconds)
    click.echo("medians, output tokens/s")
    for (name, workload), values in rates.items():
        click.echo(f"{statistics.median(values):9.2f}  {name}  {workload}")


if __name__ == "__main__":
    main()
