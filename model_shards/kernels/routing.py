"""Which experts a token visits (model_shards.gate), compiled: scores of all experts, and the best of them.

Shapes: T rows, H hidden size, E experts, G groups of E / G neighbouring experts, K experts of a token.
"""

import functools
from dataclasses import dataclass

from llvmlite import ir

from model_shards.kernels.builder import F32, LANES, Builder, Kind, Value
from model_shards.kernels.machine_code import TeamFunction

SCORES_ARGUMENTS = (
    "rows",  # address of T
    "x",  # address of bfloat16 [T, H]
    "weight",  # address of float32 [E, H]
    "out",  # address of float32 [T, E]
    "size",  # H
    "experts",  # E, a multiple of LANES
)
# Rows of x that are read again for each expert: 64 KB of 1,024 elements.
_BLOCK = 32
# Rows that are multiplied by an expert's weights at once.
_TILE = 4


@functools.cache
def gate_scores() -> TeamFunction:
    """out = x weight^T in float32. Pieces are blocks of rows by LANES experts."""
    build = Builder(SCORES_ARGUMENTS)
    given = build.arguments
    rows = build.int_at(given["rows"])
    blocks = build.ir.sdiv(build.ir.add(rows, build.const(_BLOCK - 1)), build.const(_BLOCK))
    groups = build.ir.sdiv(given["experts"], build.const(LANES))
    with build.pieces(build.ir.mul(blocks, groups)) as piece:
        first_row = build.ir.mul(build.ir.sdiv(piece, groups), build.const(_BLOCK))
        row_stop = build.smaller(build.ir.add(first_row, build.const(_BLOCK)), rows)
        first_expert = build.ir.mul(build.ir.srem(piece, groups), build.const(LANES))
        tiled = build.ir.sub(row_stop, build.ir.srem(build.ir.sub(row_stop, first_row), build.const(_TILE)))
        with build.loop(build.ir.add(first_expert, build.const(LANES)), start=first_expert) as expert:
            with build.loop(tiled, start=first_row, step=_TILE) as row:
                _score(build, row, expert, _TILE)
            with build.loop(row_stop, start=tiled) as row:
                _score(build, row, expert, 1)
    return TeamFunction(build.finish())


def _score(build: Builder, row: Value, expert: Value, count: int) -> None:
    """`count` rows by one expert."""
    given = build.arguments
    size = given["size"]
    weight = build.at(given["weight"], (expert, build.ir.mul(size, build.const(4))))
    row_bytes = build.ir.mul(size, build.const(2))
    starts = [build.at(given["x"], (build.ir.add(row, build.const(i)), row_bytes)) for i in range(count)]
    sums = [build.variable(build.numbers(0.0)) for _ in starts]
    with build.loop(size, step=LANES) as i:
        weights = build.load(build.at(weight, (i, 4)), Kind.FLOAT32)
        for start, total in zip(starts, sums, strict=True):
            total.set(build.fma(build.load(build.at(start, (i, 2)), Kind.BFLOAT16), weights, total.get()))
    for offset, total in enumerate(sums):
        place = build.ir.add(build.ir.mul(build.ir.add(row, build.const(offset)), given["experts"]), expert)
        build.put_float(build.at(given["out"], (place, 4)), build.sum(total.get()))


@dataclass(frozen=True)
class Choice:
    """How a model chooses."""

    experts: int  # E, a multiple of LANES
    groups: int  # G; 1: a token may visit experts of any
    kept_groups: int
    top_k: int  # K
    normalise: bool  # weights are divided by their sum
    scale: float  # and else multiplied by this


CHOICE_ARGUMENTS = (
    "rows",  # address of T
    "scores",  # address of float32 [T, E], which are overwritten
    "ids",  # address of int64 [T, K]
    "weights",  # address of float32 [T, K]
)


@functools.cache
def choose_experts(choice: Choice) -> TeamFunction:
    """The K best of the softmax of each row's scores, best first. Pieces are rows.

    What is not a number counts as more than any number, so that a row of such names K experts, too.
    """
    build = Builder(CHOICE_ARGUMENTS)
    given = build.arguments
    best_of_group = build.array(choice.groups)
    with build.pieces(build.int_at(given["rows"])) as row:
        scores = build.at(given["scores"], (row, 4 * choice.experts))
        _softmax(build, scores, choice.experts)
        if choice.groups > 1:
            _drop_groups(build, scores, best_of_group, choice)
        ids = build.at(given["ids"], (row, 8 * choice.top_k))
        weights = build.at(given["weights"], (row, 4 * choice.top_k))
        total = build.variable(build.number(1e-20))
        with build.loop(build.const(choice.top_k)) as k:
            chosen, score = _largest(build, scores, choice.experts)
            build.put_int(build.at(ids, (k, 8)), chosen)
            build.put_float(build.at(weights, (k, 4)), score)
            build.put_float(build.at(scores, (chosen, 4)), build.number(-2.0))
            total.set(build.ir.fadd(total.get(), score))
        factor = build.ir.fdiv(build.number(1.0), total.get()) if choice.normalise else build.number(choice.scale)
        with build.loop(build.const(choice.top_k)) as k:
            place = build.at(weights, (k, 4))
            build.put_float(place, build.ir.fmul(build.float_at(place), factor))
    return TeamFunction(build.finish())


def _softmax(build: Builder, scores: Value, count: int) -> None:
    largest = build.variable(build.numbers(float("-inf")))
    with build.loop(build.const(count), step=LANES) as i:
        value = build.load(build.at(scores, (i, 4)), Kind.FLOAT32)
        largest.set(build.larger(value, largest.get()))
    peak = build.spread(build.largest_lane(largest.get()))
    total = build.variable(build.numbers(0.0))
    with build.loop(build.const(count), step=LANES) as i:
        place = build.at(scores, (i, 4))
        power = build.exp(build.ir.fsub(build.load(place, Kind.FLOAT32), peak))
        build.store(place, power, Kind.FLOAT32)
        total.set(build.ir.fadd(total.get(), power))
    inverse = build.spread(build.ir.fdiv(build.number(1.0), build.sum(total.get())))
    with build.loop(build.const(count), step=LANES) as i:
        place = build.at(scores, (i, 4))
        build.store(place, build.ir.fmul(build.load(place, Kind.FLOAT32), inverse), Kind.FLOAT32)


def _drop_groups(build: Builder, scores: Value, best: Value, choice: Choice) -> None:
    """Lowers below every score the experts outside the groups with the best single expert (see Gate)."""
    members = choice.experts // choice.groups
    with build.loop(build.const(choice.groups)) as group:
        _, score = _largest(build, build.at(scores, (group, 4 * members)), members)
        build.put_float(build.at(best, (group, 4)), score)
    with build.loop(build.const(choice.kept_groups)):
        kept, _ = _largest(build, best, choice.groups)
        build.put_float(build.at(best, (kept, 4)), build.number(-2.0))
    with build.loop(build.const(choice.groups)) as group:
        is_kept = build.ir.fcmp_ordered("==", build.float_at(build.at(best, (group, 4))), build.number(-2.0))
        with build.ir.if_then(build.ir.not_(is_kept)):
            first = build.at(scores, (group, 4 * members))
            with build.loop(build.const(members)) as i:
                build.put_float(build.at(first, (i, 4)), build.number(-1.0))


def _largest(build: Builder, numbers: Value, count: int) -> tuple[Value, Value]:
    """(index, value) of the first of the largest of `count` float32 above -3, or of the last that is not a number."""
    index = build.variable(build.const(0))
    value = build.variable(ir.Constant(F32, -3.0))
    with build.loop(build.const(count)) as i:
        number = build.float_at(build.at(numbers, (i, 4)))
        # One that is not a number is compared with none and taken; then none is higher.
        higher = build.ir.or_(
            build.ir.fcmp_ordered(">", number, value.get()), build.ir.fcmp_unordered("uno", number, number)
        )
        index.set(build.ir.select(higher, i, index.get()))
        value.set(build.ir.select(higher, number, value.get()))
    return index.get(), value.get()
