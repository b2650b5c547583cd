"""What overlaps in a step: when each rank computed, and when it waited for the other role.

python -m benchmarks.trace --model DIR --micro-batches 2 --out DIR

Runs one workload in a cell of plain processes and writes there trace.json (for Perfetto or chrome://tracing) and
trace.png (one prefill step and one decode step), and prints for each of the two how long which role computed, and how
long both did.
"""

import dataclasses
import json
import tempfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import click

from benchmarks.engine import cell_spec, run_workload
from benchmarks.workloads import Workload
from cluster.cell import Cell
from cluster.topology import Topology
from model_shards.config import load_model_config


@dataclass(frozen=True)
class Span:
    """Seconds."""

    begin: float
    end: float


@dataclass(frozen=True)
class Wait:
    """One wait of a rank, as `cluster.dispatch.trace` wrote it."""

    span: Span
    layer: int


@dataclass(frozen=True)
class StepTimes:
    """One step, from the last combine of the one before to its own, and who computed when within it."""

    span: Span
    computing: dict[str, tuple[Span, ...]]  # by rank

    @property
    def seconds(self) -> float:
        """Of the step."""
        return self.span.end - self.span.begin

    def busy(self, rank: str) -> float:
        """Seconds in which this rank computed."""
        return sum(span.end - span.begin for span in self.computing[rank])

    def overlap(self) -> float:
        """Seconds in which an attention rank and an expert rank both computed."""
        edges = sorted({edge for spans in self.computing.values() for span in spans for edge in (span.begin, span.end)})
        total = 0.0
        for begin, end in pairwise(edges):
            roles = {
                rank[0]
                for rank, spans in self.computing.items()
                if any(span.begin <= begin and end <= span.end for span in spans)
            }
            total += (end - begin) if len(roles) == 2 else 0.0
        return total


def read_waits(directory: Path) -> dict[str, list[Wait]]:
    """The waits of each rank, in the order of time."""
    waits: dict[str, list[Wait]] = {}
    for file in sorted(directory.glob("*.json")):
        for event in json.loads(file.read_text())["traceEvents"]:
            span = Span(event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6)
            waits.setdefault(file.name.split("-")[0], []).append(Wait(span, event["args"]["layer"]))
    return waits


def steps_of(waits: dict[str, list[Wait]], last_layer: int) -> list[StepTimes]:
    """Cuts the trace where A0 is done with the last layer."""
    own = waits["A0"]
    following = [wait.layer for wait in own[1:]] + [-1]
    ends = [
        wait.span.end
        for wait, layer in zip(own, following, strict=True)
        if wait.layer == last_layer and layer != last_layer
    ]
    return [
        StepTimes(Span(begin, end), {rank: _gaps(Span(begin, end), found) for rank, found in waits.items()})
        for begin, end in pairwise(ends)
    ]


def _gaps(within: Span, waits: list[Wait]) -> tuple[Span, ...]:
    """The parts of `within` that lie in no wait."""
    parts, begin = [], within.begin
    for wait in waits:
        if wait.span.end <= within.begin or wait.span.begin >= within.end:
            continue
        if wait.span.begin > begin:
            parts.append(Span(begin, wait.span.begin))
        begin = max(begin, wait.span.end)
    if begin < within.end:
        parts.append(Span(begin, within.end))
    return tuple(parts)


def tell(name: str, step: StepTimes) -> str:
    """One line."""
    ranks = ", ".join(f"{rank} {step.busy(rank) * 1e3:.1f}" for rank in sorted(step.computing))
    return (
        f"{name}: {step.seconds * 1e3:.1f} ms; computing, ms: {ranks}; "
        f"both roles at once {step.overlap() / step.seconds:.0%}"
    )


def draw(named: dict[str, StepTimes], file: Path) -> None:
    """A row of bars a rank, one panel a step."""
    from matplotlib import pyplot  # takes a second to import, and only this needs it

    figure, panels = pyplot.subplots(len(named), 1, figsize=(12, 2.2 * len(named)), layout="constrained")
    for panel, (name, step) in zip(panels, named.items(), strict=True):
        ranks = sorted(step.computing, reverse=True)
        for row, rank in enumerate(ranks):
            bars = [
                ((span.begin - step.span.begin) * 1e3, (span.end - span.begin) * 1e3) for span in step.computing[rank]
            ]
            panel.broken_barh(bars, (row - 0.4, 0.8), facecolors="C0" if rank.startswith("A") else "C1")
        panel.set_yticks(range(len(ranks)), ranks)
        panel.set_xlabel("ms")
        panel.set_title(tell(name, step), fontsize=9)
    figure.savefig(file, dpi=110)


@click.command()
@click.option("--model", type=click.Path(exists=True, path_type=Path, file_okay=False), required=True)
@click.option("--attention", default=1, show_default=True)
@click.option("--experts", default=2, show_default=True)
@click.option("--dtype", default="bfloat16", show_default=True)
@click.option("--transport", default="shm", show_default=True, help="shm or gloo.")
@click.option("--micro-batches", default="2", show_default=True, help="auto, 1, 2 or 3.")
@click.option("--workload", "text", default="16,128,8", show_default=True, help="SEQUENCES,PROMPT,OUTPUT")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True)
def main(
    model: Path,
    attention: int,
    experts: int,
    dtype: str,
    transport: str,
    micro_batches: str,
    text: str,
    out: Path,
) -> None:
    """Traces a cell; see the top of the file."""
    workload = Workload.parse(text)
    config = load_model_config(model)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        spec = cell_spec(model, Topology(attention, experts), dtype, transport, micro_batches, (workload,))
        with Cell(dataclasses.replace(spec, trace_directory=directory)) as cell:
            run_workload(cell, attention, workload, config.vocab_size, "warm")
            cell.next_epoch()
            for file in Path(directory).glob("*.json"):  # of the warm-up
                file.unlink()
            run_workload(cell, attention, workload, config.vocab_size, "traced")
            cell.next_epoch()
            files = sorted(Path(directory).glob("*.json"))
            waits = read_waits(Path(directory))
            events = [event for file in files for event in json.loads(file.read_text())["traceEvents"]]
    (out / "trace.json").write_text(json.dumps({"traceEvents": events}), encoding="utf-8")
    steps = steps_of(waits, config.moe_layers[-1])
    decode = sorted(steps[-(workload.output_tokens // 2) :], key=lambda step: step.seconds)
    named = {"prefill": max(steps, key=lambda step: step.seconds), "decode": decode[len(decode) // 2]}
    for name, step in named.items():
        click.echo(tell(name, step))
    draw(named, out / "trace.png")


if __name__ == "__main__":
    main()
