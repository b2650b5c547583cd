"""Attention from one new token to a paged cache of bfloat16 latents with AMX: what `decode_ir` computes, faster.

Shapes: D sequences, L tokens of a context, W words of a latent (two elements each), N heads, R kv_lora_rank,
O qk_rope_head_dim. A *word* is two bfloat16 that are multiplied together (model_shards.kernels.instructions).

Sixteen heads of one sequence at a time; tokens come in chunks that stay in the cache while they are read twice:

    queries   [W, 16 heads]                      transposed once: the matrix of the scores
    scores    [tokens, 16 heads]                 16 latents as they lie times the queries, four times at once
    p         [16 heads, tokens]                 exp(scale * (scores - largest)), rounded to bfloat16, transposed
    values    [tokens / 2, R] words              an element of two latents: the matrix of the sums
    sums      [16 heads, R]                      p times values, with the softmax of model_shards.softmax_blocks

Rows of a block past the end of a context are read and have no weight: neither their scores nor their values are used.
"""

from dataclasses import dataclass

from model_shards.kernels.amx import ROW_BYTES, ROWS, Amx
from model_shards.kernels.builder import LANES, Builder, Kind, Value
from model_shards.kernels.decode_ir import ARGUMENTS, CHUNK_TOKENS
from model_shards.kernels.machine_code import TeamFunction

_WORD = 4
_HEADS = LANES
_TILE_WORDS = 16
_TILE_BYTES = ROWS * ROW_BYTES
_SUMS = 4  # registers of them
_SPAN = 2 * _TILE_WORDS  # tokens of a tile of p, and of one of values
_LEAST = -3.0e38


def serves(rank: int, rope: int, block_size: int) -> bool:
    """Whether whole registers make up such latents and blocks."""
    whole = 2 * _TILE_WORDS
    return rank % (_SUMS * LANES) == 0 and rope % whole == 0 and block_size % ROWS == 0


@dataclass(frozen=True)
class _Memory:
    """Of one thread."""

    queries: Value
    scores: Value
    p: Value
    values: Value
    sums: Value


def decode_amx(rank: int, rope: int) -> TeamFunction:
    """Of the calls whose arguments are `decode_ir.ARGUMENTS`: pieces are sixteen heads of a sequence."""
    build = Builder(ARGUMENTS)
    given = build.arguments
    words = (rank + rope) // 2
    memory = _Memory(
        queries=build.array(words * _HEADS),
        scores=build.array(CHUNK_TOKENS * _HEADS),
        p=build.array(CHUNK_TOKENS // 2 * _HEADS),
        values=build.array(CHUNK_TOKENS // 2 * rank),
        sums=build.array(_HEADS * rank),
    )
    amx = Amx(build)
    head_tiles = build.ir.sdiv(build.ir.add(given["heads"], build.const(_HEADS - 1)), build.const(_HEADS))
    with build.pieces(build.ir.mul(build.int_at(given["sequences"]), head_tiles)) as piece:
        sequence, head = build.ir.sdiv(piece, head_tiles), build.ir.srem(piece, head_tiles)
        head = build.ir.mul(head, build.const(_HEADS))
        count = build.smaller(build.ir.sub(given["heads"], head), build.const(_HEADS))
        place = build.ir.add(build.ir.mul(sequence, given["heads"]), head)
        latent = build.at(given["latent_queries"], (place, 2 * rank))
        rotated = build.at(given["rope_queries"], (sequence, given["rope_sequence"]), (head, given["rope_head"]))
        _pack(build, latent, build.const(2 * rank), count, rank // 2, memory.queries)
        behind = build.at(memory.queries, (build.const(rank // 2), ROW_BYTES))
        _pack(build, rotated, given["rope_head"], count, rope // 2, behind)
        total = _attend(build, amx, memory, rank, rope, sequence)
        _write(build, memory, rank, total, count, build.at(given["mixed"], (place, 2 * rank)))
    amx.release()
    return TeamFunction(build.finish())


def _pack(build: Builder, source: Value, row: Value, count: Value, words: int, target: Value) -> None:
    """`count` heads' rows of words to words of sixteen heads; those that are not there are zeros."""
    last = build.ir.sub(count, build.const(1))
    with build.loop(build.const(words), step=_TILE_WORDS) as word:
        rows = []
        for head in range(_HEADS):
            index = build.const(head)
            there = build.ir.icmp_signed("<", index, count)
            read = build.words_at(build.at(source, (build.smaller(index, last), row), (word, _WORD)))
            rows.append(build.ir.select(there, read, build.no_words()))
        for index, column in enumerate(build.transposed(rows)):
            build.put_words(build.at(target, (build.ir.add(word, build.const(index)), ROW_BYTES)), column)


def _attend(build: Builder, amx: Amx, memory: _Memory, rank: int, rope: int, sequence: Value) -> Value:
    """Sums over the whole context; returns what they are to be divided by, of each head: a variable's value."""
    given = build.arguments
    table = build.at(given["tables"], (sequence, given["table_row"]))
    length = build.int_at(build.at(given["lengths"], (sequence, 8)))
    largest = build.variable(build.numbers(_LEAST))
    total = build.variable(build.numbers(0.0))
    with build.loop(build.const(_HEADS * rank), step=LANES) as i:
        build.store(build.at(memory.sums, (i, 4)), build.numbers(0.0), Kind.FLOAT32)
    # A chunk is whole blocks, so that its first one is the table's next.
    chunk = build.ir.mul(build.ir.sdiv(build.const(CHUNK_TOKENS), given["block_size"]), given["block_size"])
    with build.loop(length, step=chunk) as start:
        tokens = build.smaller(build.ir.sub(length, start), chunk)
        blocks = build.at(table, (build.ir.sdiv(start, given["block_size"]), 8))
        _scores(build, amx, memory, (rank + rope) // 2, blocks, tokens)
        before = largest.get()
        peak = _largest(build, memory, tokens, before)
        largest.set(peak)
        scale = build.spread(build.float_of(given["scale"]))
        shrink = build.exp(build.ir.fmul(build.ir.fsub(before, peak), scale))
        added = _powers(build, memory, tokens, peak, scale)
        total.set(build.fma(total.get(), shrink, added))
        tiles = build.ir.sdiv(build.ir.add(tokens, build.const(_SPAN - 1)), build.const(_SPAN))
        _transpose_p(build, memory, tiles)
        _pair_values(build, memory, rank, blocks, tokens, tiles)
        with build.ir.if_then(build.ir.icmp_signed("!=", start, build.const(0))):
            _shrink(build, memory, rank, shrink)
        _mix(build, amx, memory, rank, tiles)
    return total.get()


def _row(build: Builder, blocks: Value, token: Value) -> Value:
    """Where the latent of a token of the chunk lies."""
    given = build.arguments
    row = build.ir.mul(given["words"], build.const(_WORD))
    block = build.int_at(build.at(blocks, (build.ir.sdiv(token, given["block_size"]), 8)))
    inside = build.ir.srem(token, given["block_size"])
    return build.at(given["cache"], (build.ir.add(build.ir.mul(block, given["block_size"]), inside), row))


def _scores(build: Builder, amx: Amx, memory: _Memory, words: int, blocks: Value, tokens: Value) -> None:
    """Four times sixteen tokens at once; past the last of them the last are taken again, and nobody reads those."""
    given = build.arguments
    row = build.ir.mul(given["words"], build.const(_WORD))
    tiles = build.ir.sdiv(build.ir.add(tokens, build.const(ROWS - 1)), build.const(ROWS))
    last = build.ir.sub(tiles, build.const(1))
    with build.loop(tiles, step=_SUMS) as first:
        starts = []
        for part in range(_SUMS):
            tile = build.smaller(build.ir.add(first, build.const(part)), last)
            starts.append(_row(build, blocks, build.ir.mul(tile, build.const(ROWS))))
            amx.zero(part)
        with build.loop(build.const(words), step=_TILE_WORDS) as word:
            amx.load(_SUMS, build.at(memory.queries, (word, ROW_BYTES)), build.const(ROW_BYTES))
            for part, start in enumerate(starts):
                x = _SUMS + 1 + part % 3
                amx.load(x, build.at(start, (word, _WORD)), row)
                amx.multiply(part, x, _SUMS)
        for part in range(_SUMS):
            tile = build.ir.add(first, build.const(part))
            amx.store(part, build.at(memory.scores, (tile, _TILE_BYTES)), build.const(ROW_BYTES))


def _largest(build: Builder, memory: _Memory, tokens: Value, before: Value) -> Value:
    peak = build.variable(before)
    with build.loop(tokens) as token:
        score = build.load(build.at(memory.scores, (token, ROW_BYTES)), Kind.FLOAT32)
        peak.set(build.larger(score, peak.get()))
    return peak.get()


def _powers(build: Builder, memory: _Memory, tokens: Value, peak: Value, scale: Value) -> Value:
    """Scores become powers, and zeros up to whole tiles; returns their sum."""
    total = build.variable(build.numbers(0.0))
    with build.loop(tokens) as token:
        place = build.at(memory.scores, (token, ROW_BYTES))
        power = build.exp(build.ir.fmul(build.ir.fsub(build.load(place, Kind.FLOAT32), peak), scale))
        build.store(place, power, Kind.FLOAT32)
        total.set(build.ir.fadd(total.get(), power))
    up = build.ir.mul(
        build.ir.sdiv(build.ir.add(tokens, build.const(_SPAN - 1)), build.const(_SPAN)), build.const(_SPAN)
    )
    with build.loop(up, start=tokens) as token:
        build.store(build.at(memory.scores, (token, ROW_BYTES)), build.numbers(0.0), Kind.FLOAT32)
    return total.get()


def _transpose_p(build: Builder, memory: _Memory, tiles: Value) -> None:
    """Powers of 32 tokens and sixteen heads to sixteen rows of 32 bfloat16."""
    with build.loop(tiles) as tile:
        powers = build.at(memory.scores, (tile, _SPAN * ROW_BYTES))
        pairs = []
        for pair in range(_TILE_WORDS):
            both = [
                build.load(build.at(powers, (build.const(2 * pair + token), ROW_BYTES)), Kind.FLOAT32)
                for token in range(2)
            ]
            pairs.append(build.words(*both))
        for head, row in enumerate(build.transposed(pairs)):
            build.put_words(build.at(memory.p, (tile, _TILE_BYTES), (build.const(head), ROW_BYTES)), row)


def _pair_values(
    build: Builder, memory: _Memory, rank: int, blocks: Value, tokens: Value, tiles: Value
) -> None:
    """The first R elements of the chunk's latents, two tokens a word, tile by tile: [R / 16] registers of 16 pairs.

    A second token that is not there is zeros, and so are pairs up to the end of the tile.
    """
    columns = rank // LANES
    span = columns * _TILE_BYTES

    def target(pair: Value) -> Value:
        tile, inside = build.ir.sdiv(pair, build.const(_TILE_WORDS)), build.ir.srem(pair, build.const(_TILE_WORDS))
        return build.at(memory.values, (tile, span), (inside, ROW_BYTES))

    whole = build.ir.sdiv(tokens, build.const(2))
    row = build.ir.mul(build.arguments["words"], build.const(_WORD))
    with build.loop(whole) as pair:
        first = _row(build, blocks, build.ir.mul(pair, build.const(2)))
        second = build.ir.add(first, row)  # of the same block
        place = target(pair)
        for column in range(columns):
            both = [build.halves_at(build.at(start, (build.const(column), 2 * LANES))) for start in (first, second)]
            build.put_words(build.at(place, (build.const(column), _TILE_BYTES)), build.paired(*both))
    up = build.ir.mul(tiles, build.const(_TILE_WORDS))
    with build.loop(up, start=whole) as pair:
        place = target(pair)
        for column in range(columns):
            build.put_words(build.at(place, (build.const(column), _TILE_BYTES)), build.no_words())
    with build.ir.if_then(build.ir.icmp_signed("!=", build.ir.srem(tokens, build.const(2)), build.const(0))):
        first = _row(build, blocks, build.ir.sub(tokens, build.const(1)))
        place = target(whole)
        for column in range(columns):
            halves = build.halves_at(build.at(first, (build.const(column), 2 * LANES)))
            words = build.paired(halves, build.no_halves())
            build.put_words(build.at(place, (build.const(column), _TILE_BYTES)), words)


def _shrink(build: Builder, memory: _Memory, rank: int, factors: Value) -> None:
    for head in range(_HEADS):
        factor = build.spread(build.lane(factors, head))
        sums = build.at(memory.sums, (build.const(head), 4 * rank))
        with build.loop(build.const(rank), step=LANES) as i:
            place = build.at(sums, (i, 4))
            build.store(place, build.ir.fmul(build.load(place, Kind.FLOAT32), factor), Kind.FLOAT32)


def _mix(build: Builder, amx: Amx, memory: _Memory, rank: int, tiles: Value) -> None:
    """Adds the chunk to the sums, 64 elements at once."""
    columns, row = rank // LANES, build.const(4 * rank)
    with build.loop(build.const(columns), step=_SUMS) as column:
        sums = build.at(memory.sums, (column, ROW_BYTES))
        values = build.at(memory.values, (column, _TILE_BYTES))
        for part in range(_SUMS):
            amx.load(part, build.at(sums, (build.const(part), ROW_BYTES)), row)
        with build.loop(tiles) as tile:
            amx.load(_SUMS, build.at(memory.p, (tile, _TILE_BYTES)), build.const(ROW_BYTES))
            for part in range(_SUMS):
                matrix = _SUMS + 1 + part % 3
                place = build.at(values, (tile, columns * _TILE_BYTES), (build.const(part), _TILE_BYTES))
                amx.load(matrix, place, build.const(ROW_BYTES))
                amx.multiply(part, _SUMS, matrix)
        for part in range(_SUMS):
            amx.store(part, build.at(sums, (build.const(part), ROW_BYTES)), row)


def _write(build: Builder, memory: _Memory, rank: int, total: Value, count: Value, out: Value) -> None:
    """Sums of the heads that are there, divided by their totals, as bfloat16."""
    inverse = build.ir.fdiv(build.numbers(1.0), total)
    build.store(memory.scores, inverse, Kind.FLOAT32)
    with build.loop(count) as head:
        factor = build.spread(build.float_at(build.at(memory.scores, (head, 4))))
        with build.loop(build.const(rank), step=LANES) as i:
            value = build.load(build.at(memory.sums, (head, 4 * rank), (i, 4)), Kind.FLOAT32)
            build.store(build.at(out, (head, 2 * rank), (i, 2)), build.ir.fmul(value, factor), Kind.BFLOAT16)
