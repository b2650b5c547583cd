"""What scheduling costs: no model, no exchange, one process."""

import itertools
import random
import time
from functools import partial

import torch

from benchmarks.scaling.curve import Curve, best_of, in_turn, timed
from cluster.ahead import prepare_step
from cluster.batch_builder import build_batch
from cluster.block_manager import BlockManager
from cluster.limits import EngineLimits
from cluster.request import GenerationRequest
from cluster.scheduler import ScheduledChunk, Scheduler, split_micro_batches
from cluster.sequence import Sequence
from model_shards.sampling import SamplingParams

_BLOCK_SIZE = 16
_CPU = torch.device("cpu")
_NUMBERS = itertools.count()


def scheduler_curves(rounds: int, most: int, longest: int) -> list[Curve]:
    """`most` sequences and prompts of `longest` tokens at the most."""
    counts = _doubling(16, most)
    lengths = _doubling(256, longest)
    pools = _doubling(1024, 64 * 1024)
    return [
        Curve(
            "decode step, host",
            "running sequences",
            "us a step: schedule, build_batch, commit",
            "every sequence of a step is one token to lay out",
            1,
            in_turn(counts, rounds, _decode_step_us),
        ),
        Curve(
            "decode step, prepared, until it runs",
            "running sequences",
            "us a step: take, fill in",
            "every sequence of a step is compared, and has one token to fill in",
            1,
            in_turn(counts, rounds, _prepared_step_us),
        ),
        Curve(
            "batch with one long context",
            "tokens of the long one",
            "us a batch of 255 others of 64 tokens",
            "every row of the block tables is as wide as the longest",
            1,
            in_turn(lengths, rounds, _mixed_batch_us),
        ),
        Curve(
            "ending sequences of one step",
            "running sequences",
            "us a sequence",
            "who ends is found at once",
            0,
            in_turn(counts, rounds, partial(_end_us, waiting=False)),
        ),
        Curve(
            "cancelling who waits",
            "waiting sequences",
            "us a sequence",
            "who is cancelled is found at once",
            0,
            in_turn(counts, rounds, partial(_end_us, waiting=True)),
        ),
        Curve(
            "admission, nothing known",
            "prompt tokens",
            "us a prompt",
            "its blocks are taken one by one, none is hashed yet but the first",
            1,
            in_turn(lengths, rounds, partial(_admission_us, known=False)),
        ),
        Curve(
            "admission, all known",
            "prompt tokens",
            "us a prompt",
            "every block is hashed once and looked up once",
            1,
            in_turn(lengths, rounds, partial(_admission_us, known=True)),
        ),
        Curve(
            "prefill batch of one prompt",
            "prompt tokens",
            "us a step: schedule, build_batch, commit",
            "every token is laid out, every full block hashed",
            1,
            in_turn(lengths, rounds, _prefill_step_us),
        ),
        Curve(
            "block manager, a block",
            "blocks in the cache",
            "us a block: take, publish, free, evict",
            "no list of blocks is searched",
            0,
            in_turn(pools, rounds, _block_us),
        ),
    ]


def _doubling(first: int, last: int) -> tuple[int, ...]:
    return tuple(itertools.takewhile(lambda x: x <= last, (first * 2**power for power in itertools.count())))


def _sequence(num_tokens: int, seed: int = 0) -> Sequence:
    """A prompt that depends on `seed` alone."""
    draw = random.Random(seed)
    prompt = tuple(draw.randrange(1 << 16) for _ in range(num_tokens))
    return Sequence(GenerationRequest(str(next(_NUMBERS)), prompt, 1 << 20, SamplingParams(0.0), ignore_eos=True))


def _limits(max_num_seqs: int, max_num_batched_tokens: int, num_blocks: int) -> EngineLimits:
    return EngineLimits(1 << 20, max_num_seqs, max_num_batched_tokens, _BLOCK_SIZE, num_blocks, 1)


def _running(count: int, context: int = 64) -> tuple[Scheduler, EngineLimits, list[Sequence]]:
    """A scheduler that has `count` sequences running, each with `context` tokens computed."""
    limits = _limits(count, count * context, count * (context // _BLOCK_SIZE + 4))
    scheduler = Scheduler(limits)
    sequences = [_sequence(context, seed) for seed in range(count)]
    for sequence in sequences:
        scheduler.add(sequence)
    _step(scheduler, limits)
    assert scheduler.num_running == count
    return scheduler, limits, sequences


def _step(scheduler: Scheduler, limits: EngineLimits) -> None:
    """A step as the engine makes it, with a token for each sequence that is through its context."""
    chunks = scheduler.schedule()
    for part in split_micro_batches(chunks, limits.num_micro_batches):
        build_batch(part, limits.block_size, _CPU)
    scheduler.commit(chunks)
    for chunk in chunks:
        if chunk.wants_logits:
            chunk.sequence.append(1)


def _decode_step_us(count: int) -> float:
    scheduler, limits, _ = _running(count)
    return best_of(16, lambda: timed(lambda: _step(scheduler, limits))) * 1e6


def _prepared_step_us(count: int) -> float:
    """Of a step that was laid out while the one before it ran."""
    scheduler, limits, _ = _running(count)
    chunks = scheduler.schedule()

    def take_up() -> float:
        nonlocal chunks
        prepared = prepare_step(scheduler, chunks, 1, limits.block_size)
        assert prepared is not None
        scheduler.commit(chunks)
        for chunk in chunks:
            chunk.sequence.append(1)
        begun = time.perf_counter()
        assert scheduler.take(prepared.foreseen)
        prepared.batches(_CPU)
        took = time.perf_counter() - begun
        chunks = prepared.foreseen.chunks
        return took

    return best_of(16, take_up) * 1e6


def _mixed_batch_us(longest: int) -> float:
    sequences = [_sequence(64, seed) for seed in range(255)] + [_sequence(longest)]
    blocks = BlockManager(_limits(256, 256, 255 * 4 + longest // _BLOCK_SIZE))
    for sequence in sequences:
        blocks.append(sequence)
    chunks = [ScheduledChunk(s, s.num_tokens - 1, s.num_tokens, is_decode=True, wants_logits=True) for s in sequences]
    return best_of(16, lambda: timed(lambda: build_batch(chunks, _BLOCK_SIZE, _CPU))) * 1e6


def _end_us(count: int, waiting: bool) -> float:
    """The newest first: where a list is searched from its begin, that is the dearest."""

    def end_all() -> float:
        if waiting:
            scheduler = Scheduler(_limits(1, 1, 1))
            sequences = [_sequence(1, seed) for seed in range(count)]
            for sequence in sequences:
                scheduler.add(sequence)
        else:
            scheduler, _, sequences = _running(count, context=_BLOCK_SIZE)
        begun = time.perf_counter()
        for sequence in reversed(sequences):
            scheduler.remove(sequence)
        return time.perf_counter() - begun

    return best_of(3, end_all) / count * 1e6


def _admission_us(length: int, known: bool) -> float:
    blocks = BlockManager(_limits(1, 1, 2 * (length // _BLOCK_SIZE + 1)))
    if known:
        first = _sequence(length)
        blocks.append(first)
        blocks.publish(first, 0, length)
        blocks.free(first)

    def admit() -> float:
        sequence = _sequence(length)
        begun = time.perf_counter()
        prefix = blocks.known_prefix(sequence)
        assert blocks.can_append(sequence, prefix)
        blocks.share(sequence, prefix)
        blocks.append(sequence)
        took = time.perf_counter() - begun
        assert bool(prefix) is known
        blocks.free(sequence)
        return took

    return best_of(5, admit) * 1e6


def _prefill_step_us(length: int) -> float:
    limits = _limits(1, length, length // _BLOCK_SIZE + 1)

    def prefill() -> float:
        scheduler = Scheduler(limits)
        scheduler.add(_sequence(length))
        return timed(lambda: _step(scheduler, limits))

    return best_of(5, prefill) * 1e6


def _block_us(num_blocks: int) -> float:
    """Sequences of 64 blocks come and go in a cache that is full of known blocks."""
    blocks = BlockManager(_limits(1, 1, num_blocks))
    filler = _sequence(num_blocks * _BLOCK_SIZE)
    blocks.append(filler)
    blocks.publish(filler, 0, filler.num_tokens)
    blocks.free(filler)
    of_one = 64

    def come_and_go() -> float:
        sequences = [_sequence(of_one * _BLOCK_SIZE, next(_NUMBERS) + (1 << 20)) for _ in range(4)]
        begun = time.perf_counter()
        for sequence in sequences:
            blocks.append(sequence)
            blocks.publish(sequence, 0, sequence.num_tokens)
            blocks.free(sequence)
        return (time.perf_counter() - begun) / (len(sequences) * of_one)

    return best_of(8, come_and_go) * 1e6
