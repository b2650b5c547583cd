"""How threads share the attention of decodes: sixteen heads of a sequence a piece, and where there are fewer pieces
than threads, each context in parts, whose results are then brought together.

Shapes: D sequences, L tokens of a context, N heads, R kv_lora_rank.

    pieces    sequence by sequence, sixteen heads by sixteen heads, part by part of the blocks of its context
    a slot    of a piece that is a part: [ largest score : 16 | total : 16 | result : 16 x R ]      float32

A part's result is as if there were no other tokens. With the scores' scale s, of parts p with largest scores m_p and
totals t_p the whole result is the mean of theirs, weighted by t_p exp(s (m_p - max m)).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from model_shards.kernels.builder import LANES, LEAST, Builder, Kind, Value

HEADS = LANES

# What a call of attention is told, in this order: eight bytes each.
ARGUMENTS = (
    "sequences",  # address of D
    "latent_queries",  # address of bfloat16 [D, N, R]
    "rope_queries",  # address of the first head's numbers, bfloat16
    "rope_head",  # bytes from head to head
    "rope_sequence",  # bytes from sequence to sequence
    "cache",  # address of one layer's first row
    "words",  # of a row of bfloat16, two elements each
    "block_size",  # tokens
    "tables",  # address of int64 [D, ...], a sequence's blocks
    "table_row",  # bytes from sequence to sequence
    "lengths",  # address of int64 [D], L of each, at least 1
    "mixed",  # address of bfloat16 [D, N, R]
    "heads",  # N
    "scale",  # float32, as the lower four bytes
    "slots",  # address of `num_slots` slots
    "num_slots",  # as many parts there are at most
)
# Fewer tokens are not worth a part: its queries, and bringing parts together, take as long as some 50.
_LEAST_TOKENS = 64
_RESULT_AT = 2 * HEADS * 4


def slot_floats(rank: int) -> int:
    """Size of a slot."""
    return HEADS * (2 + rank)


@dataclass(frozen=True)
class Piece:
    """What one thread attends to at a time. Addresses and numbers are i64, `is_whole` an i1."""

    latent_queries: Value  # of its first head
    rope_queries: Value
    heads: Value  # that there are, 1 to 16
    blocks: Value  # address of the number of the first block
    length: Value  # tokens
    mixed: Value  # of its first head
    is_whole: Value  # else the result goes to `slot`
    slot: Value


@contextmanager
def pieces_of_decodes(build: Builder, rank: int) -> Iterator[Piece]:
    """The code inside the block attends to a piece of this thread's, and has `put_result` write what came of it. Behind
    it all threads bring parts together."""
    given = build.arguments
    tiles = up(build, given["heads"], build.const(HEADS))
    most = _most_parts(build, tiles)
    with build.pieces(build.ir.mul(build.ir.mul(build.int_at(given["sequences"]), tiles), most)) as index:
        of_heads, part = build.ir.sdiv(index, most), build.ir.srem(index, most)
        sequence = build.ir.sdiv(of_heads, tiles)
        head = build.ir.mul(build.ir.srem(of_heads, tiles), build.const(HEADS))
        parts = _parts_of(build, sequence, most)
        with build.ir.if_then(build.ir.icmp_signed("<", part, parts)):
            length = build.int_at(build.at(given["lengths"], (sequence, 8)))
            blocks = up(build, length, given["block_size"])
            first = build.ir.sdiv(build.ir.mul(blocks, part), parts)
            stop = build.ir.sdiv(build.ir.mul(blocks, build.ir.add(part, build.const(1))), parts)
            end = build.smaller(length, build.ir.mul(stop, given["block_size"]))
            place = build.ir.add(build.ir.mul(sequence, given["heads"]), head)
            yield Piece(
                latent_queries=build.at(given["latent_queries"], (place, 2 * rank)),
                rope_queries=build.at(
                    given["rope_queries"], (sequence, given["rope_sequence"]), (head, given["rope_head"])
                ),
                heads=build.smaller(build.ir.sub(given["heads"], head), build.const(HEADS)),
                blocks=build.at(given["tables"], (sequence, given["table_row"]), (first, 8)),
                length=build.ir.sub(end, build.ir.mul(first, given["block_size"])),
                mixed=build.at(given["mixed"], (place, 2 * rank)),
                is_whole=build.ir.icmp_signed("==", parts, build.const(1)),
                slot=build.at(given["slots"], (index, 4 * slot_floats(rank))),
            )
    with build.ir.if_then(build.ir.icmp_signed(">", most, build.const(1))):
        build.barrier()
        _join(build, rank, tiles, most)


def put_result(build: Builder, piece: Piece, rank: int, largest: Value, total: Value, sums: Value) -> None:
    """Of each of sixteen heads: its largest score, and `sums` [16, R] float32 that are to be divided by `total`."""
    factors = build.array(HEADS)
    build.store(factors, build.ir.fdiv(build.numbers(1.0), total), Kind.FLOAT32)
    with build.ir.if_else(piece.is_whole) as (whole, part):
        with whole:
            _put_rows(build, piece.heads, rank, sums, factors, piece.mixed, Kind.BFLOAT16)
        with part:
            build.store(piece.slot, largest, Kind.FLOAT32)
            build.store(build.at(piece.slot, (build.const(HEADS), 4)), total, Kind.FLOAT32)
            result = build.ir.add(piece.slot, build.const(_RESULT_AT))
            _put_rows(build, piece.heads, rank, sums, factors, result, Kind.FLOAT32)


def _put_rows(build: Builder, heads: Value, rank: int, sums: Value, factors: Value, out: Value, kind: Kind) -> None:
    with build.loop(heads) as head:
        factor = build.spread(build.float_at(build.at(factors, (head, 4))))
        with build.loop(build.const(rank), step=LANES) as i:
            value = build.load(build.at(sums, (head, 4 * rank), (i, 4)), Kind.FLOAT32)
            build.store(build.at(out, (head, kind.bytes * rank), (i, kind.bytes)), build.ir.fmul(value, factor), kind)


def _join(build: Builder, rank: int, tiles: Value, most: Value) -> None:
    """Pieces are heads of a sequence, of which those in parts are written."""
    given = build.arguments
    scale = build.spread(build.float_of(given["scale"]))
    with build.pieces(build.ir.mul(build.int_at(given["sequences"]), given["heads"])) as place:
        sequence, head = build.ir.sdiv(place, given["heads"]), build.ir.srem(place, given["heads"])
        parts = _parts_of(build, sequence, most)
        with build.ir.if_then(build.ir.icmp_signed(">", parts, build.const(1))):
            tile = build.ir.add(build.ir.mul(sequence, tiles), build.ir.sdiv(head, build.const(HEADS)))
            lane = build.ir.srem(head, build.const(HEADS))
            slots = build.at(given["slots"], (build.ir.mul(tile, most), 4 * slot_floats(rank)))
            peak = build.variable(build.numbers(LEAST))
            with build.loop(parts) as part:
                peak.set(
                    build.larger(peak.get(), build.spread(build.float_at(_of_head(build, slots, part, rank, lane))))
                )
            total = build.variable(build.numbers(0.0))
            with build.loop(parts) as part:
                largest = _of_head(build, slots, part, rank, lane)
                total_at = build.at(largest, (build.const(HEADS), 4))
                below = build.ir.fsub(build.spread(build.float_at(largest)), peak.get())
                power = build.exp(build.ir.fmul(below, scale))
                weight = build.ir.fmul(power, build.spread(build.float_at(total_at)))
                total.set(build.ir.fadd(total.get(), weight))
                build.put_float(total_at, build.lane(weight, 0))  # in its place
            with build.loop(build.const(rank), step=LANES) as i:
                result = build.variable(build.numbers(0.0))
                with build.loop(parts) as part:
                    total_at = build.at(_of_head(build, slots, part, rank, lane), (build.const(HEADS), 4))
                    column = build.ir.add(build.ir.mul(lane, build.const(rank)), i)
                    at = build.at(slots, (part, 4 * slot_floats(rank)), (build.const(_RESULT_AT), 1), (column, 4))
                    weight = build.spread(build.float_at(total_at))
                    result.set(build.fma(build.load(at, Kind.FLOAT32), weight, result.get()))
                out = build.at(given["mixed"], (place, 2 * rank), (i, 2))
                build.store(out, build.ir.fdiv(result.get(), total.get()), Kind.BFLOAT16)


def _of_head(build: Builder, slots: Value, part: Value, rank: int, lane: Value) -> Value:
    """Where the largest score of one head of a part is; its total is sixteen numbers behind it."""
    return build.at(slots, (part, 4 * slot_floats(rank)), (lane, 4))


def _most_parts(build: Builder, tiles: Value) -> Value:
    """Into how many parts each context may be cut: 1 where there is a piece for every thread."""
    given = build.arguments
    whole = build.ir.mul(build.int_at(given["sequences"]), tiles)
    there = build.larger_int(whole, build.const(1))  # without a sequence it does not matter
    return build.larger_int(build.ir.sdiv(build.smaller(build.team, given["num_slots"]), there), build.const(1))


def _parts_of(build: Builder, sequence: Value, most: Value) -> Value:
    """Into how many it is."""
    given = build.arguments
    length = build.int_at(build.at(given["lengths"], (sequence, 8)))
    blocks, least = (up(build, tokens, given["block_size"]) for tokens in (length, build.const(_LEAST_TOKENS)))
    return build.larger_int(build.smaller(most, build.ir.sdiv(blocks, least)), build.const(1))


def up(build: Builder, count: Value, size: Value) -> Value:
    """How many of `size` it takes."""
    return build.ir.sdiv(build.ir.add(count, build.ir.sub(size, build.const(1))), size)
