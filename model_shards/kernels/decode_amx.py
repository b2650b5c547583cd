"""Attention from one new token to a paged cache of latents with AMX: what `decode_ir` computes, faster.

Shapes: D sequences, L tokens of a context, W words of a latent (two elements each), N heads, R kv_lora_rank,
O qk_rope_head_dim. A *word* is two bfloat16 that are multiplied together (model_shards.kernels.instructions).

Sixteen heads of one sequence at a time; tokens come in chunks that stay in the cache while they are read twice:

    queries   [W, 16 heads]                      transposed once: the matrix of the scores
    scores    [tokens, 16 heads]                 16 latents as they lie times the queries, four times at once
    p         [16 heads, tokens]                 exp(scale * (scores - largest)), rounded to bfloat16, transposed
    values    [16 pairs of tokens, 64] words     an element of two latents: the matrix of 64 columns of the sums
    sums      [16 heads, R]                      p times values, with the softmax of model_shards.softmax_blocks

Rows of a block past the end of a context are read and have no weight: neither their scores nor their values are used.
"""

from dataclasses import dataclass

from model_shards.kernels.amx import Amx
from model_shards.kernels.amx_ir import ROW_BYTES
from model_shards.kernels.builder import LANES, LEAST, Builder, Kind, Value
from model_shards.kernels.decode_ir import CHUNK_TOKENS
from model_shards.kernels.decode_parts import ARGUMENTS, HEADS, Piece, pieces_of_decodes, put_result, up
from model_shards.kernels.instructions import AMX_ROWS, AMX_WORDS
from model_shards.kernels.machine_code import TeamFunction
from model_shards.kernels.quantized_latents import WIDEN_ARGUMENTS, QuantizedRow, widen

_WORD = 4
_TILE_BYTES = AMX_ROWS * ROW_BYTES
_SUMS = 4  # registers of them
_SPAN = 2 * AMX_WORDS  # tokens of a tile of p, and of one of values
_AT_ONCE = 8  # scores


def serves(rank: int, rope: int, block_size: int) -> bool:
    """Whether whole registers make up such latents and blocks."""
    whole = 2 * AMX_WORDS
    return rank % (_SUMS * LANES) == 0 and rope % whole == 0 and block_size % AMX_ROWS == 0


@dataclass(frozen=True)
class _Memory:
    """Of one thread."""

    queries: Value
    tiles: Value  # addresses of the latents of sixteen tokens each, of the chunk
    scores: Value
    p: Value
    values: Value  # of 64 elements
    sums: Value
    widened: Value | None  # latents of the chunk, unless they are read where they lie


def decode_amx(rank: int, rope: int, row: QuantizedRow | None = None) -> TeamFunction:
    """Of the calls whose arguments are `decode_parts.ARGUMENTS`.

    `row`: how latents lie that are widened first, a chunk at a time; None: they are bfloat16.
    """
    build = Builder(ARGUMENTS)
    given = build.arguments
    words = (rank + rope) // 2
    memory = _Memory(
        queries=build.array(words * HEADS),
        tiles=build.array(CHUNK_TOKENS // AMX_ROWS * 2),
        scores=build.array(CHUNK_TOKENS * HEADS),
        p=build.array(CHUNK_TOKENS // 2 * HEADS),
        values=build.array(2 * _SUMS * _TILE_BYTES // 4),
        sums=build.array(HEADS * rank),
        widened=None if row is None else build.array(CHUNK_TOKENS * words),
    )
    amx = Amx(build)
    with pieces_of_decodes(build, rank) as piece:
        _pack(build, piece.latent_queries, build.const(2 * rank), piece.heads, rank // 2, memory.queries)
        behind = build.at(memory.queries, (build.const(rank // 2), ROW_BYTES))
        _pack(build, piece.rope_queries, given["rope_head"], piece.heads, rope // 2, behind)
        largest, total = _attend(build, amx, memory, rank, rope, row, piece)
        put_result(build, piece, rank, largest, total, memory.sums)
    return TeamFunction(build.finish(), None if row is None else {row.widen_name: widen(row)})


def _pack(build: Builder, source: Value, row: Value, count: Value, words: int, target: Value) -> None:
    """`count` heads' rows of words to words of sixteen heads; those that are not there are zeros."""
    last = build.ir.sub(count, build.const(1))
    with build.loop(build.const(words), step=AMX_WORDS) as word:
        rows = []
        for head in range(HEADS):
            index = build.const(head)
            there = build.ir.icmp_signed("<", index, count)
            read = build.words_at(build.at(source, (build.smaller(index, last), row), (word, _WORD)))
            rows.append(build.ir.select(there, read, build.no_words()))
        for index, column in enumerate(build.transposed(rows)):
            build.put_words(build.at(target, (build.ir.add(word, build.const(index)), ROW_BYTES)), column)


def _attend(
    build: Builder, amx: Amx, memory: _Memory, rank: int, rope: int, row: QuantizedRow | None, piece: Piece
) -> tuple[Value, Value]:
    """Sums over the piece's tokens; returns the largest score and what they are to be divided by, of each head."""
    given = build.arguments
    largest = build.variable(build.numbers(LEAST))
    total = build.variable(build.numbers(0.0))
    with build.loop(build.const(HEADS * rank), step=LANES) as i:
        build.store(build.at(memory.sums, (i, 4)), build.numbers(0.0), Kind.FLOAT32)
    # A chunk is whole blocks, so that its first one is the table's next.
    chunk = build.ir.mul(build.ir.sdiv(build.const(CHUNK_TOKENS), given["block_size"]), given["block_size"])
    with build.loop(piece.length, step=chunk) as start:
        tokens = build.smaller(build.ir.sub(piece.length, start), chunk)
        spans = up(build, tokens, build.const(_SPAN))
        blocks = build.at(piece.blocks, (build.ir.sdiv(start, given["block_size"]), 8))
        if row is not None:
            _widen(build, row, memory, blocks, tokens)
        _find_tiles(build, memory, blocks, tokens)
        _scores(build, amx, memory, (rank + rope) // 2, tokens)
        before = largest.get()
        peak = _largest(build, memory, tokens, spans, before)
        largest.set(peak)
        scale = build.spread(build.float_of(given["scale"]))
        shrink = build.exp(build.ir.fmul(build.ir.fsub(before, peak), scale))
        total.set(build.fma(total.get(), shrink, _powers(build, memory, spans, peak, scale)))
        with build.ir.if_then(build.ir.icmp_signed("!=", start, build.const(0))):
            _shrink(build, memory, rank, shrink)
        with build.loop(build.const(rank), step=_SUMS * LANES) as element:
            _mix(build, amx, memory, element, rank, tokens)
    return largest.get(), total.get()


def _widen(build: Builder, row: QuantizedRow, memory: _Memory, blocks: Value, tokens: Value) -> None:
    """The latents of the chunk, to bfloat16."""
    told = {**build.arguments, "tokens": tokens, "blocks": blocks, "out": memory.widened}
    build.run(row.widen_name, WIDEN_ARGUMENTS, told)


def _find_tiles(build: Builder, memory: _Memory, blocks: Value, tokens: Value) -> None:
    """Where the latents of every sixteen tokens of the chunk lie."""
    with build.loop(up(build, tokens, build.const(AMX_ROWS))) as tile:
        token = build.ir.mul(tile, build.const(AMX_ROWS))
        build.put_int(build.at(memory.tiles, (tile, 8)), _latent(build, memory, blocks, token))


def _latent(build: Builder, memory: _Memory, blocks: Value, token: Value) -> Value:
    """Where that of a token of the chunk lies."""
    given = build.arguments
    row = build.ir.mul(given["words"], build.const(_WORD))
    if memory.widened is not None:
        return build.at(memory.widened, (token, row))
    block = build.int_at(build.at(blocks, (build.ir.sdiv(token, given["block_size"]), 8)))
    inside = build.ir.srem(token, given["block_size"])
    return build.at(given["cache"], (build.ir.add(build.ir.mul(block, given["block_size"]), inside), row))


def _scores(build: Builder, amx: Amx, memory: _Memory, words: int, tokens: Value) -> None:
    """Four times sixteen tokens at once; past the last of them the last are taken again, and nobody reads those."""
    row = build.ir.mul(build.arguments["words"], build.const(_WORD))
    tiles = up(build, tokens, build.const(AMX_ROWS))
    last = build.ir.sub(tiles, build.const(1))
    with build.loop(tiles, step=_SUMS) as first:
        starts = []
        for part in range(_SUMS):
            tile = build.smaller(build.ir.add(first, build.const(part)), last)
            starts.append(build.int_at(build.at(memory.tiles, (tile, 8))))
            amx.zero(part)
        with build.loop(build.const(words), step=AMX_WORDS) as word:
            amx.load(_SUMS, build.at(memory.queries, (word, ROW_BYTES)), build.const(ROW_BYTES))
            for part, start in enumerate(starts):
                x = _SUMS + 1 + part % 3
                amx.load(x, build.at(start, (word, _WORD)), row)
                amx.multiply(part, x, _SUMS)
        for part in range(_SUMS):
            tile = build.ir.add(first, build.const(part))
            amx.store(part, build.at(memory.scores, (tile, _TILE_BYTES)), build.const(ROW_BYTES))


def _largest(build: Builder, memory: _Memory, tokens: Value, spans: Value, before: Value) -> Value:
    """Scores past the end become the least, up to whole spans."""
    end = build.ir.mul(spans, build.const(_SPAN))
    with build.loop(end, start=tokens) as token:
        build.store(build.at(memory.scores, (token, ROW_BYTES)), build.numbers(LEAST), Kind.FLOAT32)
    peak = build.variable(before)
    with build.loop(end, step=_AT_ONCE) as token:
        scores = [
            build.load(build.at(memory.scores, (token, ROW_BYTES), (build.const(i), ROW_BYTES)), Kind.FLOAT32)
            for i in range(_AT_ONCE)
        ]
        while len(scores) > 1:
            scores = [build.larger(one, other) for one, other in zip(scores[::2], scores[1::2], strict=True)]
        # Who is not a number may be passed over: its power is none either, and so are the sums.
        peak.set(build.larger(peak.get(), scores[0]))
    return peak.get()


def _powers(build: Builder, memory: _Memory, spans: Value, peak: Value, scale: Value) -> Value:
    """Scores of 32 tokens and sixteen heads become p, sixteen rows of 32 bfloat16; returns the sum of all powers."""
    totals = [build.variable(build.numbers(0.0)) for _ in range(2)]
    with build.loop(spans) as span:
        scores = build.at(memory.scores, (span, _SPAN * ROW_BYTES))
        pairs = []
        for pair in range(AMX_WORDS):
            powers = []
            for token, total in enumerate(totals):
                place = build.at(scores, (build.const(2 * pair + token), ROW_BYTES))
                below = build.ir.fsub(build.load(place, Kind.FLOAT32), peak)
                powers.append(build.exp(build.ir.fmul(below, scale)))
                total.set(build.ir.fadd(total.get(), powers[-1]))
            pairs.append(build.words(*powers))
        for head, row in enumerate(build.transposed(pairs)):
            build.put_words(build.at(memory.p, (span, _TILE_BYTES), (build.const(head), ROW_BYTES)), row)
    return build.ir.fadd(*(total.get() for total in totals))


def _shrink(build: Builder, memory: _Memory, rank: int, factors: Value) -> None:
    for head in range(HEADS):
        factor = build.spread(build.lane(factors, head))
        sums = build.at(memory.sums, (build.const(head), 4 * rank))
        with build.loop(build.const(rank), step=LANES) as i:
            place = build.at(sums, (i, 4))
            build.store(place, build.ir.fmul(build.load(place, Kind.FLOAT32), factor), Kind.FLOAT32)


def _mix(build: Builder, amx: Amx, memory: _Memory, element: Value, rank: int, tokens: Value) -> None:
    """Adds the chunk to 64 elements of the sums."""
    row = build.const(4 * rank)
    sums = build.at(memory.sums, (element, 4))
    for part in range(_SUMS):
        amx.load(part, build.at(sums, (build.const(part), ROW_BYTES)), row)
    whole = build.ir.sdiv(tokens, build.const(_SPAN))
    with build.loop(whole) as span:
        _pair_values(build, memory, element, span)
        _multiply_span(build, amx, memory, span)
    left = build.ir.srem(tokens, build.const(_SPAN))
    with build.ir.if_then(build.ir.icmp_signed("!=", left, build.const(0))):
        _pair_rest(build, memory, element, whole, left)
        _multiply_span(build, amx, memory, whole)
    for part in range(_SUMS):
        amx.store(part, build.at(sums, (build.const(part), ROW_BYTES)), row)


def _multiply_span(build: Builder, amx: Amx, memory: _Memory, span: Value) -> None:
    amx.load(_SUMS, build.at(memory.p, (span, _TILE_BYTES)), build.const(ROW_BYTES))
    values = build.at(memory.values, (build.ir.and_(span, build.const(1)), _SUMS * _TILE_BYTES))
    for part in range(_SUMS):
        matrix = _SUMS + 1 + part % 3
        amx.load(matrix, build.at(values, (build.const(part), _TILE_BYTES)), build.const(ROW_BYTES))
        amx.multiply(part, _SUMS, matrix)


def _pair_values(build: Builder, memory: _Memory, element: Value, span: Value) -> None:
    """64 elements of 32 latents from `element`, two tokens a word: a tile is sixteen pairs of sixteen elements."""
    row = build.ir.mul(build.arguments["words"], build.const(_WORD))
    values = build.at(memory.values, (build.ir.and_(span, build.const(1)), _SUMS * _TILE_BYTES))
    for tile in range(2):
        start = build.int_at(build.at(memory.tiles, (span, 16), (build.const(tile), 8)))
        for pair in range(AMX_ROWS // 2):
            first = build.at(start, (build.const(2 * pair), row), (element, 2))
            second = build.ir.add(first, row)
            inside = build.const(tile * AMX_ROWS // 2 + pair)
            for part in range(0, _SUMS, 2):
                column = (build.const(part), 2 * LANES)
                both = [build.halves_at(build.at(place, column)) for place in (first, second)]
                _put_values(build, build.at(values, (inside, ROW_BYTES)), part, both)


def _pair_rest(build: Builder, memory: _Memory, element: Value, span: Value, tokens: Value) -> None:
    """The same of fewer than 32 latents: a token that is not there is zeros."""
    row = build.ir.mul(build.arguments["words"], build.const(_WORD))
    values = build.at(memory.values, (build.ir.and_(span, build.const(1)), _SUMS * _TILE_BYTES))
    last = build.ir.sub(tokens, build.const(1))
    with build.loop(build.const(AMX_WORDS)) as pair:
        tokens_of = [build.ir.add(build.ir.mul(pair, build.const(2)), build.const(token)) for token in range(2)]
        starts = []
        for token in tokens_of:
            read = build.smaller(token, last)
            tile = build.ir.sdiv(read, build.const(AMX_ROWS))
            start = build.int_at(build.at(memory.tiles, (span, 16), (tile, 8)))
            starts.append(build.at(start, (build.ir.srem(read, build.const(AMX_ROWS)), row), (element, 2)))
        for part in range(0, _SUMS, 2):
            both = []
            for token, start in zip(tokens_of, starts, strict=True):
                there = build.ir.icmp_signed("<", token, tokens)
                halves = build.halves_at(build.at(start, (build.const(part), 2 * LANES)))
                both.append(build.ir.select(there, halves, build.no_halves()))
            _put_values(build, build.at(values, (pair, ROW_BYTES)), part, both)


def _put_values(build: Builder, values: Value, part: int, both: list[Value]) -> None:
    """Thirty-two elements of two tokens to two tiles."""
    for i, words in enumerate(build.interleaved(*both)):
        build.put_words(build.at(values, (build.const(part + i), _TILE_BYTES)), words)
