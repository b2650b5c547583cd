"""What a decode step costs in a cell of plain processes, against all that a cell grows by.

Ranks share this machine's cores, so a step's time is the work of all ranks: with M attention ranks M batches are
computed, and the law is a straight line even where on a machine with a core for each rank it would be a constant.
"""

import itertools
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.scaling.curve import Curve, in_turn, quick_quartile
from benchmarks.scaling.law import Point
from cluster.cell import Cell
from cluster.limits import EngineLimits
from cluster.request import GenerationRequest
from cluster.spec import CellSpec
from cluster.topology import Topology
from model_shards.sampling import SamplingParams
from tests.reference import make_hf_config, random_hf_model, save_checkpoint

_VOCAB = 96
_LAYERS = 3  # one dense, two MoE
_BLOCK_SIZE = 16
_MODEL: dict[str, object] = {"vocab_size": _VOCAB, "num_hidden_layers": _LAYERS, "n_group": 1, "topk_group": 1}
_TIMEOUT_S = 120.0
_WARM_STEPS = 3


@dataclass(frozen=True)
class Sizes:
    """What is measured; all that is not varied stands at `batch` 8, `context` 64, 16 experts, M = 1, N = 2."""

    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    experts: tuple[int, ...]
    attention_ranks: tuple[int, ...]
    expert_ranks: tuple[int, ...]
    steps: int  # that are timed at each point


@dataclass(frozen=True)
class _Shape:
    """What a cell is made of."""

    num_attention: int
    num_expert: int
    experts: int


_BASE = _Shape(1, 2, 16)


@dataclass(frozen=True)
class _Running:
    """A cell with its topology."""

    cell: Cell
    num_attention: int


class _Checkpoints:
    """Random models, made when they are first asked for."""

    def __init__(self, directory: Path, max_len: int) -> None:
        self._directory = directory
        self._max_len = max_len

    def with_experts(self, count: int) -> Path:
        """The directory of the model with so many routed experts."""
        path = self._directory / f"experts-{count}"
        if not path.exists():
            config = make_hf_config(**_MODEL, n_routed_experts=count, max_position_embeddings=self._max_len)
            save_checkpoint(random_hf_model(config, seed=1), path)
        return path


def data_plane_curves(sizes: Sizes, rounds: int) -> list[Curve]:
    """Starts a cell for each topology and each number of experts."""
    longest = max(sizes.contexts) + 4 * sizes.steps + 64
    with tempfile.TemporaryDirectory() as name:
        checkpoints = _Checkpoints(Path(name), longest)
        with _cell(checkpoints, _BASE, max(sizes.batches), longest) as base:

            def against(shapes: dict[int, _Shape]) -> tuple[Point, ...]:
                """All cells of a curve at once, idle but for one, so that a slow minute meets all of them."""
                with ExitStack() as stack:
                    cells = {
                        x: base if shape == _BASE else stack.enter_context(_cell(checkpoints, shape, 8, 256))
                        for x, shape in shapes.items()
                    }
                    return in_turn(tuple(cells), rounds, lambda x: _step_us(cells[x], 8, 64, sizes.steps))

            batches = in_turn(sizes.batches, rounds, lambda batch: _step_us(base, batch, 64, sizes.steps))
            contexts = in_turn(sizes.contexts, rounds, lambda context: _step_us(base, 4, context, sizes.steps))
            experts = against({count: replace(_BASE, experts=count) for count in sizes.experts})
            by_n = against({n: replace(_BASE, num_expert=n) for n in sizes.expert_ranks})
            by_m = against({m: replace(_BASE, num_attention=m) for m in sizes.attention_ranks})
    step = "us a decode step"
    return [
        Curve("step against batch", "sequences", step, "every sequence is one more row", 1, batches),
        Curve("step against context", "tokens", step, "attention reads every latent once", 1, contexts),
        Curve("step against experts", "routed experts", step, "an expert's weights are read once at most", 1, experts),
        Curve("step against N", "expert ranks", step, "one message more there and back in each layer", 1, by_n),
        Curve("step against M", "attention ranks", step, "one batch more, and its messages to each shard", 1, by_m),
    ]


@contextmanager
def _cell(checkpoints: _Checkpoints, shape: _Shape, max_batch: int, max_len: int) -> Iterator[_Running]:
    longest = -(-max_len // _BLOCK_SIZE) + 1
    limits = EngineLimits(
        max_model_len=max_len,
        max_num_seqs=max_batch,
        max_num_batched_tokens=2048,
        block_size=_BLOCK_SIZE,
        num_blocks=max(4 * longest, max_batch * (256 // _BLOCK_SIZE)),
        num_micro_batches=1,
    )
    topology = Topology(shape.num_attention, shape.num_expert)
    spec = CellSpec(
        str(checkpoints.with_experts(shape.experts)), topology, "cpu", "float32", limits, log_level="WARNING"
    )
    with ExitStack() as stack:
        running = _Running(stack.enter_context(Cell(spec)), shape.num_attention)
        _step_us(running, 1, 8, 4)  # first use of code and memory
        yield running


def _step_us(running: _Running, batch: int, context: int, steps: int) -> float:
    """The lower quartile of the time between two tokens while `batch` sequences decode on every attention rank."""
    draw = random.Random(context)
    prompt = tuple(draw.randrange(3, _VOCAB) for _ in range(context))
    for rank in range(running.num_attention):
        for index in range(batch):
            # Sequences of one prompt share its blocks, and only the first of a round computes them.
            request = GenerationRequest(
                f"{rank}-{index}", prompt, steps + 2 * _WARM_STEPS, SamplingParams(0.0), ignore_eos=True
            )
            running.cell.submit(rank, request)
    arrivals: list[float] = []
    started: set[str] = set()
    left = batch * running.num_attention
    for output in running.cell.outputs(_TIMEOUT_S):
        started.add(output.request_id)
        if output.request_id == "0-0" and len(started) == batch * running.num_attention:
            arrivals.append(time.perf_counter())
        left -= output.finish_reason is not None
        if not left:
            break
    gaps = [later - earlier for earlier, later in itertools.pairwise(arrivals)]
    steady = gaps[_WARM_STEPS:]
    if len(steady) < steps // 2:
        raise RuntimeError(f"only {len(steady)} of {steps} steps had every sequence in them")
    return quick_quartile(steady) * 1e6
