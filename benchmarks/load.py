"""How fast an expert shard reads its slice of a checkpoint, against `dd` reading the same bytes of the same files.

python -m benchmarks.load --model DIR [--shards 2] [--repeats 5]

DIR is a Hugging Face directory or one that `shoal shard` cut. The slice is that of the first of `--shards` shards.
`dd` and the loader run in turn, over a page cache that holds nothing of the files (cold) and all of them (warm); `dd`
reads the extents of the slice one after another, and only what it says that copying took counts. What lies below the
page cache, such as the cache of a virtual machine's host, is not emptied: only the ratio means something.
`lay_out`, which comes after reading, is timed apart, once.
"""

import os
import re
import statistics
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import torch

from model_shards.config import ModelConfig, load_model_config
from model_shards.experts import ExpertShardModel
from model_shards.weights import load_expert_shard
from model_shards.weights.check import Checkpoint

CPU = torch.device("cpu")
_BLOCK_BYTES = 2**20  # that dd reads at once
_DD_SECONDS = re.compile(r"copied, ([\d.e+-]+) s,")


@dataclass(frozen=True)
class Extent:
    """Bytes of a file that follow each other."""

    file: Path
    start: int
    end: int


@dataclass(frozen=True)
class Slice:
    """What one shard loads."""

    directory: Path
    config: ModelConfig
    experts: tuple[int, ...]
    dtype: torch.dtype

    def extents(self) -> list[Extent]:
        """Where its tensors lie, in the order of the files, neighbours joined."""
        checkpoint = Checkpoint.open(self.directory)
        meta = ExpertShardModel(self.config, self.experts, self.dtype, torch.device("meta"), checkpoint.quantization)
        names = {name for name, _ in meta.hf_slices()}
        tensors = checkpoint.tensors(self.config, names)
        stored = [tensors[name] for name in names]
        extents: list[Extent] = []
        for tensor in sorted(stored, key=lambda tensor: (tensor.file, tensor.start)):
            start, end = tensor.start, tensor.start + tensor.num_bytes
            if extents and (extents[-1].file, extents[-1].end) == (tensor.file, start):
                start = extents.pop().start
            extents.append(Extent(tensor.file, start, end))
        return extents

    def load(self) -> ExpertShardModel:
        """As an expert rank does, without laying out."""
        return load_expert_shard(self.directory, self.config, self.experts, self.dtype, CPU)


@dataclass(frozen=True)
class Times:
    """Seconds of one round."""

    dd: float
    load: float


def drop_from_page_cache(files: Sequence[Path]) -> None:
    """What is not on the disk yet is written first: dirty pages stay."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def dd_seconds(extents: Sequence[Extent]) -> float:
    """Of copying alone, without the starts of the processes."""
    total = 0.0
    for extent in extents:
        command = (
            *("dd", f"if={extent.file}", "of=/dev/null", f"bs={_BLOCK_BYTES}", "iflag=skip_bytes,count_bytes"),
            *(f"skip={extent.start}", f"count={extent.end - extent.start}"),
        )
        environment = {**os.environ, "LC_ALL": "C"}
        said = subprocess.run(command, check=True, stderr=subprocess.PIPE, text=True, env=environment).stderr
        seconds = _DD_SECONDS.search(said)
        if seconds is None:
            raise click.ClickException(f"dd did not tell its time: {said}")
        total += float(seconds[1])
    return total


def measure_round(part: Slice, extents: Sequence[Extent], cold: bool) -> Times:
    """`dd`, then the loader, each with the page cache as `cold` says."""
    files = list(dict.fromkeys(extent.file for extent in extents))
    if cold:
        drop_from_page_cache(files)
    dd = dd_seconds(extents)
    if cold:
        drop_from_page_cache(files)
    begun = time.perf_counter()
    part.load()
    return Times(dd, time.perf_counter() - begun)


def lay_out_seconds(part: Slice) -> float:
    """Of a slice that was just read."""
    shard = part.load()
    begun = time.perf_counter()
    shard.lay_out()
    return time.perf_counter() - begun


def report(state: str, num_bytes: int, rounds: Sequence[Times]) -> str:
    """One line: medians, and the median of the rounds' ratios."""
    dd = statistics.median(times.dd for times in rounds)
    load = statistics.median(times.load for times in rounds)
    ratios = [times.dd / times.load for times in rounds]
    return (
        f"{state}: dd {num_bytes / dd / 1e6:6.0f} MB/s, load {num_bytes / load / 1e6:6.0f} MB/s, "
        f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}); load {load:.2f} s"
    )


@click.command()
@click.option("--model", type=click.Path(path_type=Path, exists=True, file_okay=False), required=True)
@click.option("--shards", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--dtype", type=click.Choice(["bfloat16", "float32"]), default="bfloat16", show_default=True)
@click.option("--repeats", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True)
def main(model: Path, shards: int, dtype: str, repeats: int, threads: int) -> None:
    """Measures; see the top of the file."""
    torch.set_num_threads(threads)
    config = load_model_config(model)
    num_experts = (config.n_routed_experts or 0) // shards
    part = Slice(model, config, tuple(range(num_experts)), getattr(torch, dtype))
    extents = part.extents()
    num_bytes = sum(extent.end - extent.start for extent in extents)
    num_files = len({extent.file for extent in extents})
    click.echo(
        f"{num_experts} of {config.n_routed_experts} experts in {dtype}: {num_bytes / 1e9:.2f} GB "
        f"in {len(extents)} extents of {num_files} files; medians of {repeats}"
    )
    click.echo(f"lay_out: {lay_out_seconds(part):.2f} s")
    for state in ("cold", "warm"):
        measure_round(part, extents, cold=False)  # fills the page cache, and warms up the process
        click.echo(report(state, num_bytes, [measure_round(part, extents, state == "cold") for _ in range(repeats)]))


if __name__ == "__main__":
    main()
