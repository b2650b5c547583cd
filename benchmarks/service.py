"""What the service costs: `shoal serve` behind gRPC against the same cell of plain processes.

python -m benchmarks.service                                     the package's own checkpoint
python -m benchmarks.service --model DIR --dtype bfloat16

Both stand all the time and are idle in turn. One line of JSON a run; then medians, their ratio, the time to the first
token on each side, and the CPU time that the processes of the service, and this client, take for an output token.
"""

import asyncio
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import click
import grpc
import psutil

from benchmarks.engine import cell_spec, first_token, run_workload
from benchmarks.workloads import Timing, Workload
from cluster.cell import Cell
from cluster.spec import CellSpec
from cluster.topology import Topology
from deploy.gateway import inference_pb2 as pb
from deploy.gateway.inference_pb2_grpc import InferenceStub
from deploy.models import default_model_directory
from model_shards.config import load_model_config
from tests.serving import running_service

_FIRST = Workload(1, 32, 2)  # of which the first token is timed
_TIMEOUT_S = 240.0
# What stands in the command line of a process of the service, and what it is.
_PARTS = {
    "ProxyActor": "proxy",
    "shoal:gateway": "gateway",
    "shoal:attention": "attention",
    "ExpertRank": "experts",
    "haproxy": "haproxy",
}


class Service:
    """Requests over gRPC, as a client sends them; use it in one event loop."""

    def __init__(self, channel: grpc.aio.Channel, root: psutil.Process) -> None:
        self._stub = InferenceStub(channel)  # type: ignore[no-untyped-call]  # generated code
        self._root = root
        self.num_chunks = 0

    async def first_token(self, prompt: tuple[int, ...], output_tokens: int) -> float:
        """Seconds from the call to its first token; it is then read to its end."""
        begun = time.perf_counter()
        first = 0.0
        async for chunk in self._stub.Completion(_request(prompt, output_tokens), timeout=_TIMEOUT_S):
            self.num_chunks += 1
            if chunk.token_ids and not first:
                first = time.perf_counter() - begun
        return first

    async def run(self, workload: Workload, vocab_size: int) -> Timing:
        """All prompts at once."""
        begun = time.perf_counter()
        firsts = await asyncio.gather(
            *(self.first_token(prompt, workload.output_tokens) for prompt in workload.prompts(vocab_size))
        )
        return Timing(time.perf_counter() - begun, max(firsts))

    def cpu_seconds(self) -> Mapping[str, float]:
        """CPU time spent so far, by part."""
        spent: dict[str, float] = defaultdict(float)
        for process in self._root.children(recursive=True):
            line = " ".join(process.cmdline())
            name = next((part for word, part in _PARTS.items() if word in line), "the rest of Ray")
            times = process.cpu_times()
            spent[name] += times.user + times.system
        own = psutil.Process().cpu_times()
        spent["client"] = own.user + own.system
        return spent


def _request(prompt: tuple[int, ...], output_tokens: int) -> pb.CompletionRequest:
    return pb.CompletionRequest(
        token_ids=pb.TokenIds(ids=prompt), max_tokens=output_tokens, temperature=0.0, ignore_eos=True
    )


def settings_of(spec: CellSpec) -> list[str]:
    """The arguments of a `shoal serve` with the same cell."""
    limits = spec.limits
    keys = {
        "engine.max_model_len": limits.max_model_len,
        "engine.max_num_seqs": limits.max_num_seqs,
        "engine.max_num_batched_tokens": limits.max_num_batched_tokens,
        "engine.block_size": limits.block_size,
        "engine.kv_cache_tokens": limits.num_blocks * limits.block_size,
        "engine.max_decode_slowdown": "null" if limits.max_decode_slowdown is None else limits.max_decode_slowdown,
        "engine.attention_weights": spec.attention_weights,
        "engine.prefix_cache": str(limits.prefix_cache).lower(),
        "cell.micro_batches": "auto" if limits.choose_micro_batches else limits.num_micro_batches,
    }
    topology = spec.topology
    return [
        *("--model", spec.model_directory, "--dtype", spec.dtype),
        *("--attention-replicas", str(topology.num_attention), "--expert-shards", str(topology.num_expert)),
        *(word for key, value in keys.items() for word in ("--set", f"{key}={value}")),
    ]


async def measure(
    spec: CellSpec, workload: Workload, rounds: int, first_rounds: int, address: str, pid: int, cell: Cell
) -> None:
    """Prints the runs and what they come to."""
    vocab_size = load_model_config(Path(spec.model_directory)).vocab_size
    num_attention = spec.topology.num_attention
    total = workload.num_sequences * workload.output_tokens
    rates: dict[str, list[float]] = defaultdict(list)
    spent: dict[str, list[float]] = defaultdict(list)
    chunks: list[float] = []
    async with grpc.aio.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        service = Service(channel, psutil.Process(pid))
        run_workload(cell, num_attention, workload, vocab_size, "warm")
        await service.run(workload, vocab_size)
        for number in range(rounds):
            timing = run_workload(cell, num_attention, workload, vocab_size, f"run-{number}")
            click.echo(timing.line("engine", workload))
            rates["engine"].append(total / timing.seconds)
            before, service.num_chunks = service.cpu_seconds(), 0
            timing = await service.run(workload, vocab_size)
            click.echo(timing.line("service", workload))
            rates["service"].append(total / timing.seconds)
            for part, seconds in service.cpu_seconds().items():
                spent[part].append((seconds - before[part]) / total)
            chunks.append(service.num_chunks / total)
        firsts: dict[str, list[float]] = defaultdict(list)
        for number, prompt in enumerate(Workload(first_rounds, _FIRST.prompt_tokens, 1).prompts(vocab_size)):
            firsts["engine"].append(first_token(cell, f"first-{number}", prompt, _FIRST.output_tokens)[0])
            firsts["service"].append(await service.first_token(prompt, _FIRST.output_tokens))
    rate = {side: statistics.median(values) for side, values in rates.items()}
    first = {side: statistics.median(values) for side, values in firsts.items()}
    report = {
        "output_tok_s": {side: round(value, 1) for side, value in rate.items()},
        "ratio": round(rate["service"] / rate["engine"], 3),
        "first_token_ms": {side: round(value * 1e3, 2) for side, value in first.items()},
        "added_ms": round((first["service"] - first["engine"]) * 1e3, 2),
        "cpu_us_per_token": {part: round(statistics.median(values) * 1e6) for part, values in sorted(spent.items())},
        "chunks_per_token": round(statistics.median(chunks), 2),
    }
    click.echo(json.dumps(report, indent=1))


@click.command()
@click.option("--model", type=click.Path(exists=True, path_type=Path, file_okay=False), help="Default: the package's.")
@click.option("--attention", default=1, show_default=True)
@click.option("--experts", default=2, show_default=True)
@click.option("--dtype", default="float32", show_default=True)
@click.option("--workload", "text", default="32,128,64", show_default=True, help="SEQUENCES,PROMPT,OUTPUT")
@click.option("--rounds", default=5, show_default=True)
@click.option("--proxy", default="auto", show_default=True, help="What stands before the gateway: haproxy or python.")
@click.option("--first-rounds", default=30, show_default=True, help="Requests whose first token is timed.")
def main(
    model: Path | None, attention: int, experts: int, dtype: str, text: str, rounds: int, proxy: str, first_rounds: int
) -> None:
    """Measures the service; see the top of the file."""
    workload = Workload.parse(text)
    directory = (model or default_model_directory()).absolute()
    spec = cell_spec(directory, Topology(attention, experts), dtype, "shm", "1", (workload, _FIRST))
    arguments = [*settings_of(spec), "--set", f"server.proxy={proxy}"]
    with running_service(*arguments) as service, Cell(spec) as cell:
        asyncio.run(measure(spec, workload, rounds, first_rounds, service.grpc, service.process.pid, cell))


if __name__ == "__main__":
    main()
