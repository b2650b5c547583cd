"""Both roles in one process, without any exchange: what separate ranks are compared with.

python -m benchmarks.colocated --model DIR --threads 2

Prints one line of JSON a workload, as benchmarks.engine does.
"""

import time
from pathlib import Path

import click
import torch

from benchmarks.engine import cell_spec
from benchmarks.workloads import WORKLOADS, Timing, Workload
from cluster.device import torch_dtype
from cluster.dispatch.base import StepPlan
from cluster.dispatch.local import LocalDispatcher
from cluster.engine import Engine
from cluster.request import GenerationRequest, StepOutput
from cluster.topology import Topology
from model_shards.config import load_model_config
from model_shards.kv_cache import LatentKVCache
from model_shards.sampling import SamplingParams
from model_shards.weights import load_attention_model, load_expert_shard

_CPU = torch.device("cpu")


class ColocatedEngine:
    """An engine whose one expert shard is called directly."""

    def __init__(self, model: Path, dtype: str, workloads: tuple[Workload, ...]) -> None:
        spec = cell_spec(model, Topology(1, 1), dtype, "shm", "1", workloads)
        config = load_model_config(model)
        placement = spec.placement(config)
        attention = load_attention_model(model, config, torch_dtype(spec), _CPU)
        attention.lay_out()
        shard = load_expert_shard(model, config, placement.shards[0], torch_dtype(spec), _CPU)
        shard.lay_out()
        cache = LatentKVCache(config, spec.limits.num_blocks, spec.limits.block_size, torch_dtype(spec), _CPU)
        self.vocab_size = config.vocab_size
        self._engine = Engine(config, attention, cache, spec.limits)
        self._dispatcher = LocalDispatcher([shard], placement, _CPU)

    def step(self) -> list[StepOutput]:
        """One step, committed."""
        step = self._engine.schedule()
        self._dispatcher.begin_step(StepPlan(1, (tuple(batch.num_tokens for batch in step.micro_batches),)))
        return self._engine.commit(step, self._engine.run(step, [self._dispatcher.routed(0)]))

    def run(self, workload: Workload, name: str) -> Timing:
        """All prompts at once."""
        begun = time.perf_counter()
        for index, prompt in enumerate(workload.prompts(self.vocab_size)):
            self._engine.add(
                GenerationRequest(
                    f"{name}-{index}", prompt, workload.output_tokens, SamplingParams(0.0), ignore_eos=True
                )
            )
        started: set[str] = set()
        prefilled = begun
        while self._engine.has_work():
            for output in self.step():
                if output.request_id not in started:
                    started.add(output.request_id)
                    prefilled = time.perf_counter()
        return Timing(time.perf_counter() - begun, prefilled - begun)


@click.command()
@click.option("--model", type=click.Path(exists=True, path_type=Path, file_okay=False), required=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--dtype", default="bfloat16", show_default=True)
@click.option("--workload", "texts", multiple=True, help="SEQUENCES,PROMPT,OUTPUT; those of the peers if not given.")
def main(model: Path, threads: int, dtype: str, texts: tuple[str, ...]) -> None:
    """Measures one process; see the top of the file."""
    torch.set_num_threads(threads)
    workloads = tuple(map(Workload.parse, texts)) or WORKLOADS
    engine = ColocatedEngine(model, dtype, workloads)
    engine.run(Workload(1, 8, 4), "warm")
    for workload in workloads:
        click.echo(engine.run(workload, str(workload)).line(f"colocated, {threads} threads", workload))


if __name__ == "__main__":
    main()
