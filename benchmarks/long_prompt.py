"""What running streams notice of a long prompt that comes in: the time between their tokens before, and while it is
computed, with and without `engine.max_decode_slowdown`.

python -m benchmarks.long_prompt --model DIR --streams 8 --prompt 8192

With more than one attention rank (--attention) the streams run on another than the prompt. Prints one line of JSON a
run. A token's time is that since the stream's last one, as the front end sees it.
"""

import dataclasses
import json
import statistics
import time
from pathlib import Path

import click

from benchmarks.engine import cell_spec
from benchmarks.workloads import Workload
from cluster.cell import Cell
from cluster.request import GenerationRequest
from cluster.topology import Topology
from model_shards.config import load_model_config
from model_shards.sampling import SamplingParams

_TIMEOUT_S = 600.0
_SHORT_PROMPT = 64
_SETTLED = 24  # tokens of each stream before the prompt comes: enough for what a step takes to be known


def measure(cell: Cell, last_replica: int, streams: int, prompt: int, output: int, vocab_size: int) -> dict[str, float]:
    """Medians and 95th percentiles in ms, and seconds until the prompt's first token.

    The streams run on the last replica, the prompt on the first.
    """

    def submit(replica: int, name: str, tokens: tuple[int, ...], count: int) -> None:
        cell.submit(replica, GenerationRequest(name, tokens, count, SamplingParams(0.0), ignore_eos=True))

    for index, tokens in enumerate(Workload(streams, _SHORT_PROMPT, output).prompts(vocab_size)):
        submit(last_replica, f"stream-{index}", tokens, output)
    last: dict[str, float] = {}
    seen: dict[str, int] = {}
    before: list[float] = []
    during: list[float] = []
    sent = arrived = 0.0
    for result in cell.outputs(_TIMEOUT_S):
        now = time.perf_counter()
        name = result.request_id
        seen[name] = seen.get(name, 0) + 1
        if name == "long":
            arrived = now
            break
        if result.finish_reason is not None:
            # From then on the prompt would have the cell to itself, or a part of it.
            raise click.ClickException("a stream ended before the prompt was computed: give them more tokens, --output")
        if name in last and seen[name] > 2:
            if not sent:
                before.append(now - last[name])
            elif last[name] > sent:
                during.append(now - last[name])
        last[name] = now
        if not sent and len(seen) == streams and min(seen.values()) >= _SETTLED:
            submit(0, "long", Workload(1, prompt, 1).prompts(vocab_size)[0], 1)
            sent = time.perf_counter()
    milliseconds = {
        f"{name}_{what}_ms": round(value * 1e3, 1)
        for name, times in (("before", before), ("during", during))
        for what, value in (("median", statistics.median(times)), ("p95", statistics.quantiles(times, n=20)[-1]))
    }
    ratio = statistics.median(during) / statistics.median(before)
    return milliseconds | {"slowdown": round(ratio, 2), "first_token_s": round(arrived - sent, 2)}


@click.command()
@click.option("--model", type=click.Path(exists=True, path_type=Path, file_okay=False), required=True)
@click.option("--attention", default=1, show_default=True)
@click.option("--experts", default=2, show_default=True)
@click.option("--dtype", default="bfloat16", show_default=True)
@click.option("--streams", default=8, show_default=True)
@click.option("--prompt", default=8192, show_default=True, help="Tokens of the long prompt.")
@click.option("--output", default=4096, show_default=True, help="Tokens of each stream.")
@click.option("--slowdown", "slowdowns", multiple=True, type=float, help="0: no bound.  [default: 2, 0]")
def main(
    model: Path,
    attention: int,
    experts: int,
    dtype: str,
    streams: int,
    prompt: int,
    output: int,
    slowdowns: tuple[float, ...],
) -> None:
    """Measures a cell; see the top of the file."""
    vocab_size = load_model_config(model).vocab_size
    shapes = (Workload(1, prompt, 2), Workload(streams + 1, _SHORT_PROMPT, output))
    for slowdown in slowdowns or (2.0, 0.0):
        spec = cell_spec(model, Topology(attention, experts), dtype, "shm", "auto", shapes)
        limits = dataclasses.replace(
            spec.limits,
            max_decode_slowdown=slowdown or None,
            num_blocks=sum(
                spec.limits.blocks_for(shape.prompt_tokens + shape.output_tokens + 1) * shape.num_sequences
                for shape in shapes
            ),
        )
        with Cell(dataclasses.replace(spec, limits=limits)) as cell:
            figures = measure(cell, attention - 1, streams, prompt, output, vocab_size)
        click.echo(
            json.dumps({"max_decode_slowdown": slowdown or None, "streams": streams, "prompt": prompt} | figures)
        )


if __name__ == "__main__":
    main()
