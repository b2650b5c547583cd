"""The workloads of the peers through a real `shoal serve`, over gRPC.

python -m benchmarks.service_workloads --model DIR

Prints one line of JSON a workload, as benchmarks.engine does.
"""

import asyncio
from pathlib import Path

import click
import grpc
import psutil

from benchmarks.engine import cell_spec
from benchmarks.service import Service, settings_of
from benchmarks.workloads import WORKLOADS, Workload
from cluster.topology import Topology
from model_shards.config import load_model_config
from tests.serving import running_service


async def measure(model: Path, workloads: tuple[Workload, ...], address: str, pid: int) -> None:
    """Prints the runs."""
    vocab_size = load_model_config(model).vocab_size
    async with grpc.aio.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        service = Service(channel, psutil.Process(pid))
        await service.run(Workload(1, 8, 4), vocab_size)
        for workload in workloads:
            timing = await service.run(workload, vocab_size)
            click.echo(timing.line("shoal over gRPC", workload))


@click.command()
@click.option("--model", type=click.Path(exists=True, path_type=Path, file_okay=False), required=True)
@click.option("--attention", default=1, show_default=True)
@click.option("--experts", default=2, show_default=True)
@click.option("--dtype", default="bfloat16", show_default=True)
@click.option("--attention-weights", default="auto", show_default=True, help="auto or int8.")
@click.option("--workload", "texts", multiple=True, help="SEQUENCES,PROMPT,OUTPUT; those of the peers if not given.")
def main(model: Path, attention: int, experts: int, dtype: str, attention_weights: str, texts: tuple[str, ...]) -> None:
    """Measures a service; see the top of the file."""
    workloads = tuple(map(Workload.parse, texts)) or WORKLOADS
    directory = model.absolute()
    spec = cell_spec(directory, Topology(attention, experts), dtype, "auto", "auto", workloads, attention_weights)
    with running_service(*settings_of(spec)) as service:
        asyncio.run(measure(directory, workloads, service.grpc, service.process.pid))


if __name__ == "__main__":
    main()
