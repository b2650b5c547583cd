"""Attention of a prefill chunk to one block of its context, expanded to keys and values, as compiled functions.

Shapes: Q new tokens, B keys of the block in tiles of 64, N heads, P qk_nope_head_dim, O qk_rope_head_dim,
R kv_lora_rank, V v_head_dim. A *word* is two bfloat16 that are multiplied together (model_shards.kernels.instructions).

    transpose   latents [B, R + O]           ->  words [tiles, (R + O) / 2, 64 keys]
    expand      W_UK words, latents W_UV     ->  keys [N, tiles, (P + O) / 2, 64 keys], values [N, V / 64, B / 2, 64]
    attend      softmax(q keys) values       ->  what is known of each query so far (model_shards.softmax_blocks)

Both products of attention then are products of tiles: a key's elements are inputs of the first, and keys are those of
the second. Products are of bfloat16, probabilities included, and are summed in float32; so is the softmax.
"""

import functools
from dataclasses import dataclass

from model_shards.kernels.builder import LANES, LEAST, Builder, Kind, Value
from model_shards.kernels.instructions import Instructions
from model_shards.kernels.machine_code import TeamFunction

TILE = 64  # outputs of a tile of weights
# Keys of a block: of 16 heads of 128 and 64 elements 328 KB a head, which stay in the second-level cache.
BLOCK = 512
# Queries that one thread takes at once, a multiple of the rows that instructions take.
QUERIES = 96

_WORD = 4
_ROW = TILE * 4  # bytes of a tile's row: words or float32


@dataclass(frozen=True)
class HeadShape:
    """Sizes of a head."""

    nope: int  # P, even
    rope: int  # O, even
    rank: int  # R, even
    value: int  # V, a multiple of TILE

    @property
    def latent_words(self) -> int:
        """(R + O) / 2."""
        return (self.rank + self.rope) // 2

    @property
    def key_words(self) -> int:
        """(P + O) / 2."""
        return (self.nope + self.rope) // 2

    @property
    def key_bytes(self) -> int:
        """Of a head's keys of a block."""
        return BLOCK * self.key_words * _WORD

    @property
    def value_bytes(self) -> int:
        """Of a head's values of a block."""
        return BLOCK // 2 * self.value * _WORD


TRANSPOSE_ARGUMENTS = (
    "tiles",
    "latents",  # address of bfloat16 [tiles * 64, R + O]
    "words",  # address of [tiles, (R + O) / 2, 64]
)


@functools.cache
def transpose(shape: HeadShape) -> TeamFunction:
    """Pieces are tiles."""
    build = Builder(TRANSPOSE_ARGUMENTS)
    given = build.arguments
    words = shape.latent_words
    with build.pieces(given["tiles"]) as tile, build.loop(build.const(TILE)) as key:
        row = build.ir.add(build.ir.mul(tile, build.const(TILE)), key)
        source = build.at(given["latents"], (row, words * _WORD))
        target = build.at(given["words"], (tile, words * _ROW), (key, _WORD))
        with build.loop(build.const(words)) as word:
            build.put_short_int(build.at(target, (word, _ROW)), build.short_int_at(build.at(source, (word, _WORD))))
    return TeamFunction(build.finish())


EXPAND_ARGUMENTS = (
    "tiles",
    "heads",  # N
    "latents",  # address of bfloat16 [tiles * 64, R + O]
    "words",  # address of [tiles, (R + O) / 2, 64]
    "w_uk",  # address of bfloat16 [N, P, R]
    "w_uv",  # address of N matrices of [V, R], laid out
    "keys",  # address of [N, BLOCK / 64, (P + O) / 2, 64]
    "values",  # address of [N, V / 64, BLOCK / 2, 64]
)


@functools.cache
def expand(shape: HeadShape, instructions: Instructions) -> TeamFunction:
    """Pieces are a tile of a head."""
    build = Builder(EXPAND_ARGUMENTS, instructions)
    given = build.arguments
    rank_words = build.const(shape.rank // 2)
    numbers = build.array(max(shape.nope, TILE) * TILE)
    row = build.const(_ROW)
    with build.pieces(build.ir.mul(given["tiles"], given["heads"])) as piece:
        tile, head = build.ir.sdiv(piece, given["heads"]), build.ir.srem(piece, given["heads"])
        words = build.at(given["words"], (tile, shape.latent_words * _ROW))
        keys = build.at(given["keys"], (head, shape.key_bytes), (tile, shape.key_words * _ROW))
        w_uk = build.at(given["w_uk"], (head, 2 * shape.nope * shape.rank))
        build.tile_rows(build.const(shape.nope), w_uk, build.const(2 * shape.rank), words, rank_words, numbers, row)
        _pair_rows(build, numbers, keys, shape.nope // 2)
        rope = build.const(shape.rope // 2 * _ROW)
        build.copy(build.at(words, (rank_words, _ROW)), build.at(keys, (build.const(shape.nope // 2), _ROW)), rope)

        first = build.ir.mul(tile, build.const(TILE))
        latents = build.at(given["latents"], (first, shape.latent_words * _WORD))
        w_uv = build.at(given["w_uv"], (head, 2 * shape.value * shape.rank))
        values = build.at(given["values"], (head, shape.value_bytes), (tile, TILE // 2 * _ROW))
        latent_bytes = build.const(shape.latent_words * _WORD)
        with build.loop(build.const(shape.value // TILE)) as part:
            matrix = build.at(w_uv, (part, 2 * TILE * shape.rank))
            build.tile_rows(build.const(TILE), latents, latent_bytes, matrix, rank_words, numbers, row)
            _pair_rows(build, numbers, build.at(values, (part, BLOCK // 2 * _ROW)), TILE // 2)
    return TeamFunction(build.finish())


def _pair_rows(build: Builder, numbers: Value, words: Value, count: int) -> None:
    """Rows 2i and 2i + 1 of float32 to row i of words."""
    with build.loop(build.const(count)) as pair, build.loop(build.const(TILE), step=LANES) as i:
        first = build.at(numbers, (pair, 2 * _ROW), (i, 4))
        second = build.ir.add(first, build.const(_ROW))
        halves = (build.load(first, Kind.FLOAT32), build.load(second, Kind.FLOAT32))
        build.put_words(build.at(words, (pair, _ROW), (i, _WORD)), build.words(*halves))


ATTEND_ARGUMENTS = (
    "new",  # Q
    "past",  # tokens of the context before the new ones
    "start",  # of the block in the context; 0: nothing is known of any query yet
    "is_last",  # 1: the block is the last, and the result is written
    "tiles",
    "heads",  # N
    "queries",  # address of bfloat16 [Q, N, P + O]
    "keys",
    "values",
    "sums",  # address of float32 [N, Q, V]
    "totals",  # address of float32 [N, Q, 2]: the largest score, and the total
    "out",  # address of bfloat16 [Q, N, V]
    "scale",  # float32, as the lower four bytes
)


@functools.cache
def attend(shape: HeadShape, instructions: Instructions) -> TeamFunction:
    """Pieces are up to QUERIES queries of a head."""
    build = Builder(ATTEND_ARGUMENTS, instructions)
    given = build.arguments
    group = instructions.rows
    memory = _Memory(
        scores=build.array(group * BLOCK),
        probabilities=build.array(group * BLOCK // 2),
        mixed=build.array(group * shape.value),
        shrink=build.array(group),
    )
    blocks = build.ir.sdiv(build.ir.add(given["new"], build.const(QUERIES - 1)), build.const(QUERIES))
    with build.pieces(build.ir.mul(blocks, given["heads"])) as piece:
        head = build.ir.srem(piece, given["heads"])
        first = build.ir.mul(build.ir.sdiv(piece, given["heads"]), build.const(QUERIES))
        stop = build.smaller(build.ir.add(first, build.const(QUERIES)), given["new"])
        with build.loop(stop, start=first, step=group) as row:
            count = build.smaller(build.ir.sub(stop, row), build.const(group))
            with build.ir.if_then(build.ir.icmp_signed("==", given["start"], build.const(0))):
                _begin(build, shape, head, row, count)
            # What the last of these queries sees of the block.
            seen = build.ir.sub(build.ir.add(build.ir.add(given["past"], row), count), given["start"])
            seen = build.smaller(seen, build.ir.mul(given["tiles"], build.const(TILE)))
            with build.ir.if_then(build.ir.icmp_signed(">", seen, build.const(0))):
                _group(build, shape, memory, head, row, count, seen)
            with build.ir.if_then(build.ir.icmp_signed("!=", given["is_last"], build.const(0))):
                _end(build, shape, head, row, count)
    return TeamFunction(build.finish())


@dataclass(frozen=True)
class _Memory:
    """Of a group of queries."""

    scores: Value  # float32 [rows, BLOCK]
    probabilities: Value  # bfloat16 [rows, BLOCK]
    mixed: Value  # float32 [rows, V]
    shrink: Value  # float32 [rows]


def _sums(build: Builder, shape: HeadShape, head: Value, row: Value) -> Value:
    place = build.ir.add(build.ir.mul(head, build.arguments["new"]), row)
    return build.at(build.arguments["sums"], (place, 4 * shape.value))


def _totals(build: Builder, head: Value, row: Value) -> Value:
    place = build.ir.add(build.ir.mul(head, build.arguments["new"]), row)
    return build.at(build.arguments["totals"], (place, 8))


def _begin(build: Builder, shape: HeadShape, head: Value, row: Value, count: Value) -> None:
    sums, totals = _sums(build, shape, head, row), _totals(build, head, row)
    with build.loop(build.ir.mul(count, build.const(shape.value)), step=LANES) as i:
        build.store(build.at(sums, (i, 4)), build.numbers(0.0), Kind.FLOAT32)
    with build.loop(count) as i:
        build.put_float(build.at(totals, (i, 8)), build.number(LEAST))
        build.put_float(build.at(totals, (i, 8), (build.const(1), 4)), build.number(0.0))


def _group(
    build: Builder, shape: HeadShape, memory: _Memory, head: Value, row: Value, count: Value, seen: Value
) -> None:
    """Takes the block in for `count` queries from `row`, whose last sees the first `seen` keys of it."""
    given = build.arguments
    tiles = build.ir.sdiv(build.ir.add(seen, build.const(TILE - 1)), build.const(TILE))
    head_bytes = 2 * (shape.nope + shape.rope)
    query_row = build.ir.mul(given["heads"], build.const(head_bytes))
    queries = build.at(given["queries"], (row, query_row), (head, head_bytes))
    keys = build.at(given["keys"], (head, shape.key_bytes))
    with build.loop(tiles) as tile:
        build.tile_rows(
            count,
            queries,
            query_row,
            build.at(keys, (tile, shape.key_words * _ROW)),
            build.const(shape.key_words),
            build.at(memory.scores, (tile, _ROW)),
            build.const(4 * BLOCK),
        )
    width = build.ir.mul(tiles, build.const(TILE))
    visible = build.ir.sub(build.ir.add(build.ir.add(given["past"], row), build.const(1)), given["start"])
    totals = _totals(build, head, row)
    with build.loop(count) as i:
        _softmax(
            build,
            build.at(memory.scores, (i, 4 * BLOCK)),
            width,
            build.ir.add(visible, i),
            build.at(totals, (i, 8)),
            build.at(memory.probabilities, (i, 2 * BLOCK)),
            build.at(memory.shrink, (i, 4)),
        )
    values = build.at(given["values"], (head, shape.value_bytes))
    with build.loop(build.const(shape.value // TILE)) as part:
        build.tile_rows(
            count,
            memory.probabilities,
            build.const(2 * BLOCK),
            build.at(values, (part, BLOCK // 2 * _ROW)),
            build.ir.sdiv(width, build.const(2)),
            build.at(memory.mixed, (part, _ROW)),
            build.const(4 * shape.value),
        )
    sums = _sums(build, shape, head, row)
    with build.loop(count) as i:
        shrink = build.spread(build.float_at(build.at(memory.shrink, (i, 4))))
        with build.loop(build.const(shape.value), step=LANES) as j:
            offset = build.ir.add(build.ir.mul(i, build.const(shape.value)), j)
            place = build.at(sums, (offset, 4))
            mixed = build.load(build.at(memory.mixed, (offset, 4)), Kind.FLOAT32)
            build.store(place, build.fma(build.load(place, Kind.FLOAT32), shrink, mixed), Kind.FLOAT32)


def _softmax(
    build: Builder, scores: Value, width: Value, visible: Value, totals: Value, probabilities: Value, shrink: Value
) -> None:
    """Of one query, which sees the first `visible` of `width` keys, none if that is below 1."""
    scale = build.spread(build.float_of(build.arguments["scale"]))
    before, total_at = build.float_at(totals), build.at(totals, (build.const(1), 4))
    largest = build.variable(build.spread(before))
    with build.loop(width, step=LANES) as i:
        place = build.at(scores, (i, 4))
        left = build.ir.sub(visible, i)
        seen = build.first_lanes(left, build.load(place, Kind.FLOAT32), build.numbers(float("-inf")))
        build.store(place, seen, Kind.FLOAT32)
        largest.set(build.larger(seen, largest.get()))
    peak = build.largest_lane(largest.get())
    build.put_float(totals, peak)
    peaks = build.spread(peak)
    fell = build.exp(build.ir.fmul(build.ir.fsub(build.spread(before), peaks), scale))
    total = build.variable(build.numbers(0.0))
    with build.loop(width, step=LANES) as i:
        below = build.ir.fsub(build.load(build.at(scores, (i, 4)), Kind.FLOAT32), peaks)
        power = build.exp(build.ir.fmul(below, scale))
        build.store(build.at(probabilities, (i, 2)), power, Kind.BFLOAT16)
        total.set(build.ir.fadd(total.get(), power))
    kept = build.largest_lane(fell)
    build.put_float(shrink, kept)
    known = build.ir.fmul(build.float_at(total_at), kept)
    build.put_float(total_at, build.ir.fadd(known, build.sum(total.get())))


def _end(build: Builder, shape: HeadShape, head: Value, row: Value, count: Value) -> None:
    given = build.arguments
    sums, totals = _sums(build, shape, head, row), _totals(build, head, row)
    out_row = build.ir.mul(given["heads"], build.const(2 * shape.value))
    with build.loop(count) as i:
        total = build.float_at(build.at(totals, (i, 8), (build.const(1), 4)))
        inverse = build.spread(build.ir.fdiv(build.number(1.0), total))
        out = build.at(given["out"], (build.ir.add(row, i), out_row), (head, 2 * shape.value))
        with build.loop(build.const(shape.value), step=LANES) as j:
            offset = build.ir.add(build.ir.mul(i, build.const(shape.value)), j)
            value = build.ir.fmul(build.load(build.at(sums, (offset, 4)), Kind.FLOAT32), inverse)
            build.store(build.at(out, (j, 2)), value, Kind.BFLOAT16)
