"""Where the time of a step goes, and what more micro-batches were foretold to gain against what they do.

python -m benchmarks.parts --model DIR --attention 1 --experts 2 --workload 32,128,64

Each number of micro-batches has a cell of its own, in turn, `--rounds` times; the workload runs there once before it is
measured. Prints medians for steps until every sequence has its first token, and for those behind them, milliseconds a
step of the first replica: all of it, attention computing, attention waiting, the slowest expert rank computing; of one
micro-batch the exchange, which is the waiting that experts do not explain; of more than one the best case, as
`cluster.micro_batches.best_case` has it from fewer.
"""

import statistics
from collections import Counter, defaultdict
from pathlib import Path

import click

from benchmarks.engine import cell_spec, submit_workload
from benchmarks.workloads import Workload
from cluster.cell import Cell
from cluster.micro_batches import StepParts, best_case
from cluster.request import StepTimes
from cluster.topology import Topology
from model_shards.config import load_model_config

_TIMEOUT_S = 600.0
_PHASES = ("prefill", "decode")


def phases(cell: Cell, num_attention: int, workload: Workload, vocab_size: int, name: str) -> dict[str, StepTimes]:
    """What the first replica's steps took, by phase."""
    begin = cell.load(0).times
    submit_workload(cell, num_attention, workload, vocab_size, name)
    outputs: Counter[str] = Counter()
    prefilled, left = None, workload.num_sequences
    for output in cell.outputs(_TIMEOUT_S):
        outputs[output.request_id] += 1
        # What a step took is known when the next one begins: the last prefill's, at the latest, at everybody's second.
        if prefilled is None and len(outputs) == workload.num_sequences and min(outputs.values()) > 1:
            prefilled = cell.load(0).times
        left -= output.finish_reason is not None
        if not left:
            break
    assert prefilled is not None, "every sequence has more than one token"
    return {"prefill": prefilled.since(begin), "decode": cell.load(0).times.since(prefilled)}


def parts_of(times: StepTimes) -> StepParts:
    """Of a step, on average."""
    step_s, waited_s, experts_s = (
        total / max(times.num_steps, 1) for total in (times.step_s, times.waited_s, times.experts_s)
    )
    return StepParts(step_s - waited_s, waited_s, experts_s)


def median(rounds: list[StepParts]) -> StepParts:
    """Of each part."""
    return StepParts(
        statistics.median(parts.attention for parts in rounds),
        statistics.median(parts.waiting for parts in rounds),
        statistics.median(parts.experts for parts in rounds),
    )


def lines(phase: str, by_count: dict[int, StepParts]) -> list[str]:
    """One for each number of micro-batches, in ascending order."""
    told = []
    for count, parts in by_count.items():
        foretold = f"exchange {parts.exchange * 1e3:.2f}" if count == 1 else ""
        fewer = [by_count[below] for below in by_count if below < count]
        if 1 in by_count and fewer:
            foretold = f"best case {best_case(by_count[1], fewer[-1], count) * 1e3:.2f}"
        told.append(
            f"{phase:8s} {count}  step {(parts.attention + parts.waiting) * 1e3:9.2f}  "
            f"attention {parts.attention * 1e3:9.2f}  waiting {parts.waiting * 1e3:9.2f}  "
            f"experts {parts.experts * 1e3:9.2f}  {foretold}"
        )
    return told


@click.command()
@click.option("--model", type=click.Path(exists=True, path_type=Path, file_okay=False), required=True)
@click.option("--attention", default=1, show_default=True)
@click.option("--experts", default=2, show_default=True)
@click.option("--dtype", default="bfloat16", show_default=True)
@click.option("--transport", default="shm", show_default=True, help="shm or gloo.")
@click.option("--micro-batches", default="1,2,3", show_default=True, help="In ascending order.")
@click.option("--workload", "text", default="32,128,64", show_default=True, help="SEQUENCES,PROMPT,OUTPUT")
@click.option("--rounds", default=3, show_default=True)
def main(
    model: Path, attention: int, experts: int, dtype: str, transport: str, micro_batches: str, text: str, rounds: int
) -> None:
    """Measures the parts; see the top of the file."""
    workload = Workload.parse(text)
    vocab_size = load_model_config(model).vocab_size
    found: dict[str, dict[int, list[StepParts]]] = {phase: defaultdict(list) for phase in _PHASES}
    for _ in range(rounds):
        for count in map(int, micro_batches.split(",")):
            spec = cell_spec(model, Topology(attention, experts), dtype, transport, str(count), (workload,))
            with Cell(spec) as cell:
                phases(cell, attention, workload, vocab_size, "warm")
                for phase, times in phases(cell, attention, workload, vocab_size, "run").items():
                    found[phase][count].append(parts_of(times))
    click.echo(f"{attention} attention and {experts} expert ranks, {dtype}, {transport}, {workload}; ms a step")
    for phase, by_count in found.items():
        for line in lines(phase, {count: median(each) for count, each in by_count.items()}):
            click.echo(line)


if __name__ == "__main__":
    main()
