"""Time to first token of a long prompt, against a + b n + c n^2, and its logits against a reference.

python -m benchmarks.long_context --model DIR --state FILE [--tokens 131072] [--dtype bfloat16 --kv-cache-dtype int8]

The first layers of a checkpoint are cut out and prefilled chunk by chunk on the CPU. A prompt's chunks are
the first chunks of a longer one, so one run measures every length: the time to first token of n tokens is the sum of
the chunks up to n. Attention of 128k tokens is 4e13 products a layer, so a run stops after `--seconds` and leaves
its cache and its times in FILE; the same command goes on from there, and the last one compares and tells.

In float32 nothing is laid out, every position must be equal to the reference, and a difference is an error. In bfloat16
the layers are programs, as in a cell. A gate that is nearly undecided may choose otherwise there: the bound is on the
usual position.
"""

import dataclasses
import json
import resource
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import click
import numpy
import torch
from safetensors.torch import load_file, save_file

from benchmarks.long_context_reference import sampled_reference
from cluster.dispatch import LocalDispatcher, StepPlan
from model_shards.batch import AttentionBatch
from model_shards.config import load_model_config
from model_shards.kv_cache import LatentKVCache, bytes_per_block
from model_shards.model import AttentionModel
from model_shards.placement import contiguous_placement
from model_shards.quantization import Quantization
from model_shards.routed import RoutedExperts
from model_shards.weights import load_attention_model, load_expert_shard

CPU = torch.device("cpu")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_CACHES = {"auto": None, "int8": Quantization.INT8, "fp8": Quantization.FP8}
# Of logits, relative: at every position in float32, at the usual one in bfloat16.
_ERROR = {torch.float32: 1e-4, torch.bfloat16: 0.05}
# Of latents, relative, at every position: those that are stored are off by their rounding.
_LATENT_ERROR = {
    (torch.float32, "auto"): 1e-4,
    (torch.bfloat16, "auto"): 0.02,
    (torch.bfloat16, "int8"): 0.04,
    (torch.bfloat16, "fp8"): 0.08,
}
_BLOCK_SIZE = 16
_LENGTHS = (8192, 16384, 32768, 65536, 131072)
_FITTED_UP_TO = 32768
_SAMPLES = 24


@dataclass
class Progress:
    """What a run leaves for the next one."""

    chunk: int
    stored: str = ""  # dtype and kv_cache_dtype: a run goes on with the same
    seconds: list[float] = field(default_factory=list)  # of each chunk
    logits: dict[int, torch.Tensor] = field(default_factory=dict)  # position -> [vocabulary]
    peak_bytes: int = 0  # resident, above what was held before the first chunk
    data: torch.Tensor | None = None  # the cache


@dataclass(frozen=True)
class Machine:
    """The cut model."""

    model: AttentionModel
    dispatcher: LocalDispatcher

    def routed(self, tokens: int) -> RoutedExperts:
        """The experts, for one micro-batch."""
        self.dispatcher.begin_step(StepPlan(1, ((tokens,),)))
        routed = self.dispatcher.routed(0)
        assert routed is not None, "every chunk has tokens"
        return routed

    @staticmethod
    def load(directory: Path, layers: int, dtype: torch.dtype) -> "Machine":
        """All experts in this process. Bfloat16 is laid out."""
        with tempfile.TemporaryDirectory() as cut:
            cut_layers(directory, Path(cut), layers)
            config = load_model_config(Path(cut))
            held = tuple(range(config.n_routed_experts or 0))
            shard = load_expert_shard(Path(cut), config, held, dtype, CPU)
            model = load_attention_model(Path(cut), config, dtype, CPU)
        if dtype is torch.bfloat16:
            model.lay_out()
            shard.lay_out()
        return Machine(model, LocalDispatcher([shard], contiguous_placement(len(held), 1), CPU))


def cut_layers(directory: Path, out: Path, layers: int) -> None:
    """The first layers of a checkpoint, as a checkpoint."""
    config = json.loads((directory / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
    kept = {}
    for file in directory.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            parts = name.split(".")
            if parts[1] != "layers" or int(parts[2]) < layers:
                kept[name] = tensor
    save_file(kept, out / "model.safetensors")


def chunk_batch(token_ids: torch.Tensor, start: int, stop: int, wanted: Sequence[int]) -> AttentionBatch:
    """Tokens [start, stop) of one sequence whose blocks lie anywhere; logits at the positions `wanted`."""
    slots = slots_of(token_ids.shape[0])
    return AttentionBatch(
        token_ids=token_ids[start:stop],
        positions=torch.arange(start, stop),
        slot_mapping=slots[start:stop],
        cu_seqlens_q=(0, stop - start),
        context_lens=(stop,),
        block_tables=_table(token_ids.shape[0])[None],
        num_decodes=0,
        logits_indices=torch.tensor([position - start for position in wanted], dtype=torch.int64),
    )


def slots_of(tokens: int) -> torch.Tensor:
    """[C], where token i is cached."""
    positions = torch.arange(tokens)
    return _table(tokens)[positions // _BLOCK_SIZE] * _BLOCK_SIZE + positions % _BLOCK_SIZE


def _table(tokens: int) -> torch.Tensor:
    return torch.randperm(-(-tokens // _BLOCK_SIZE), generator=torch.Generator().manual_seed(5))


def run_batch(machine: Machine, batch: AttentionBatch, cache: LatentKVCache) -> torch.Tensor:
    """Logits [R, vocabulary]."""
    steps = machine.model.forward_steps(batch, cache, machine.routed(batch.num_tokens))
    while True:
        try:
            next(steps)
        except StopIteration as finished:
            logits: torch.Tensor = finished.value
            return logits


def sampled_positions(tokens: int, chunk: int) -> list[int]:
    """The first and last ones, those at YaRN's original context and at edges of chunks, and others at random."""
    draw = torch.Generator().manual_seed(6)
    fixed = [0, 1, 4095, 4096, chunk - 1, chunk, tokens // 2, tokens - chunk, tokens - 2, tokens - 1]
    drawn = torch.randint(tokens, (_SAMPLES,), generator=draw).tolist()
    return sorted({position for position in fixed + drawn if position < tokens})


def advance(
    machine: Machine, token_ids: torch.Tensor, cache: LatentKVCache, progress: Progress, seconds: float
) -> None:
    """Prefills chunk after chunk until all are done or the time is used up."""
    tokens, chunk = token_ids.shape[0], progress.chunk
    sampled = sampled_positions(tokens, chunk)
    held = _peak_bytes()
    begun = time.perf_counter()
    for start in range(len(progress.seconds) * chunk, tokens, chunk):
        stop = min(start + chunk, tokens)
        wanted = sorted({*(position for position in sampled if start <= position < stop), stop - 1})
        started = time.perf_counter()
        logits = run_batch(machine, chunk_batch(token_ids, start, stop, wanted), cache)
        progress.seconds.append(time.perf_counter() - started)
        progress.logits |= dict(zip(wanted, logits, strict=True))
        progress.peak_bytes = max(progress.peak_bytes, _peak_bytes() - held)
        click.echo(f"{stop:7d} tokens, chunk {progress.seconds[-1]:7.3f} s, so far {sum(progress.seconds):8.2f} s")
        # The next chunk takes a little longer than this one.
        if time.perf_counter() - begun + 1.2 * progress.seconds[-1] > seconds:
            return


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def fit(lengths: Sequence[int], seconds: Sequence[float]) -> numpy.ndarray:
    """a, b, c of a + b n + c n^2 with the least sum of squared relative errors."""
    n, t = numpy.asarray(lengths, dtype=float), numpy.asarray(seconds)
    terms = numpy.stack([numpy.ones_like(n), n, n * n], axis=1)
    scale = 1 / (n * n).max()  # columns of one size
    solved = numpy.linalg.lstsq(terms * [1, scale**0.5, scale] / t[:, None], numpy.ones_like(t), rcond=None)[0]
    return numpy.asarray(solved * [1, scale**0.5, scale])


def tell(progress: Progress, tokens: int) -> None:
    """The table of times, and the law that was fitted to the short ones alone."""
    ends = [min((index + 1) * progress.chunk, tokens) for index in range(len(progress.seconds))]
    until = dict(zip(ends, numpy.cumsum(progress.seconds).tolist(), strict=True))
    short = [end for end in ends if end <= _FITTED_UP_TO]
    a, b, c = fit(short, [until[end] for end in short])
    whole = fit(ends, list(until.values()))
    click.echo(f"fitted up to {_FITTED_UP_TO}: {a:.4g} + {b:.4g} n + {c:.4g} n^2; to all: {whole}")
    for length in _LENGTHS:
        if length in until:
            law = a + b * length + c * length**2
            every = whole[0] + whole[1] * length + whole[2] * length**2
            click.echo(
                f"| {length} | {until[length]:.2f} s | {law:.2f} s | {until[length] / law - 1:+.1%} "
                f"| {every:.2f} s | {until[length] / every - 1:+.1%} |"
            )


@click.command()
@click.option("--model", type=click.Path(exists=True, path_type=Path, file_okay=False), required=True)
@click.option("--state", type=click.Path(path_type=Path, dir_okay=False), required=True)
@click.option("--layers", default=2, show_default=True)
@click.option("--dtype", type=click.Choice(list(_DTYPES)), default="float32", show_default=True)
@click.option("--kv-cache-dtype", type=click.Choice(list(_CACHES)), default="auto", show_default=True)
@click.option("--tokens", default=131072, show_default=True)
@click.option("--chunk", default=4096, show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--seconds", default=240.0, show_default=True)
def main(
    model: Path,
    state: Path,
    layers: int,
    dtype: str,
    kv_cache_dtype: str,
    tokens: int,
    chunk: int,
    threads: int,
    seconds: float,
) -> None:
    """Measures; see the top of the file."""
    torch.set_num_threads(threads)
    computed, quantization = _DTYPES[dtype], _CACHES[kv_cache_dtype]
    if (computed, kv_cache_dtype) not in _LATENT_ERROR:
        raise click.UsageError(f"--kv-cache-dtype {kv_cache_dtype} is compared with --dtype bfloat16 only, got {dtype}")
    machine = Machine.load(model, layers, computed)
    config = machine.model.config
    token_ids = torch.randint(3, config.vocab_size, (tokens,), generator=torch.Generator().manual_seed(7))
    cache = LatentKVCache(config, -(-tokens // _BLOCK_SIZE), _BLOCK_SIZE, computed, CPU, quantization)
    progress = Progress(chunk, f"{dtype}, {kv_cache_dtype}")
    if state.exists():
        before = Progress(**torch.load(state))
        if before.stored != progress.stored:
            raise click.UsageError(f"{state} is of a run in {before.stored}, not {progress.stored}")
        progress = before
        assert progress.data is not None
        cache.data.copy_(progress.data)
        progress.data = None
    else:
        cache.data.fill_(0)  # touch every page: what grows from here on is not the cache
    advance(machine, token_ids, cache, progress, seconds)
    done = min(len(progress.seconds) * progress.chunk, tokens)
    if done < tokens:
        saved = {entry.name: getattr(progress, entry.name) for entry in dataclasses.fields(progress)}
        torch.save({**saved, "data": cache.data}, state)
        click.echo(f"{done} of {tokens} tokens; the same command goes on")
        return
    tell(progress, tokens)
    per_token = bytes_per_block(config, _BLOCK_SIZE, computed, quantization) // _BLOCK_SIZE
    click.echo(f"cache {per_token * tokens / 2**20:.1f} MiB, peak above it {progress.peak_bytes / 2**20:.1f} MiB")
    exact = machine if computed is torch.float32 else Machine.load(model, layers, torch.float32)
    compare(exact, token_ids, cache, progress, _ERROR[computed], _LATENT_ERROR[computed, kv_cache_dtype])


def compare(
    exact: Machine,
    token_ids: torch.Tensor,
    cache: LatentKVCache,
    progress: Progress,
    most: float,
    most_of_latents: float,
) -> None:
    """Raises click.ClickException where the sampled positions differ from the reference by more.

    `exact` is the model in float32, as it was read.
    """
    tokens = token_ids.shape[0]
    sampled = torch.tensor(sampled_positions(tokens, progress.chunk))
    begun = time.perf_counter()
    reference = sampled_reference(exact.model, exact.routed(len(sampled)), token_ids, sampled, cache, slots_of(tokens))
    actual = torch.stack([progress.logits[int(position)] for position in sampled])
    error = (actual - reference.logits).norm(dim=-1) / reference.logits.norm(dim=-1)
    same = int((actual.argmax(-1) == reference.logits.argmax(-1)).sum())
    click.echo(
        f"{len(sampled)} positions in {time.perf_counter() - begun:.1f} s: logits differ by {float(error.max()):.2e} "
        f"of their norm at most and {float(error.median()):.2e} in the median, latents by at most "
        f"{reference.latent_error:.2e}; {same} of {len(sampled)} choose the same token"
    )
    exactly = most == _ERROR[torch.float32]
    judged = float(error.max() if exactly else error.median())
    if not (judged <= most and reference.latent_error <= most_of_latents) or (exactly and same != len(sampled)):
        raise click.ClickException("the prefill is not equal to the reference")


if __name__ == "__main__":
    main()
