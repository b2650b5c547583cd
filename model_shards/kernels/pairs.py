"""The pairs (row, slot) of an expert shard, expert after expert and back (model_shards.experts), compiled.

Shapes: R rows, K slots of a row, E experts, P pairs that name one, H hidden size.
"""

import functools

from model_shards.kernels.builder import LANES, Builder, Kind
from model_shards.kernels.machine_code import TeamFunction
from model_shards.kernels.rows import quantize_row

SORT_ARGUMENTS = (
    "slots",  # address of R * K
    "local_ids",  # address of int32 [R * K]; below 0: none
    "experts",  # E
    "counts",  # address of int64 [E]
    "ends",  # address of int64 [E], to compute in
    "places",  # address of int64 [R * K]; below 0: none
    "pairs",  # address of P; -1 when an id is not below E: no slot has a pair then
    "halt",  # address, written then
)


@functools.cache
def sort_pairs() -> TeamFunction:
    """Writes counts, places and P: where each slot's pair lies when pairs are sorted by expert, in order within one."""
    build = Builder(SORT_ARGUMENTS)
    given = build.arguments
    slots = build.int_at(given["slots"])
    zero, one = build.const(0), build.const(1)
    with build.only_first():
        beyond = build.variable(zero)
        with build.loop(slots) as slot:
            expert = build.short_int_at(build.at(given["local_ids"], (slot, 4)))
            is_beyond = build.ir.icmp_signed(">=", expert, given["experts"])
            beyond.set(build.ir.select(is_beyond, one, beyond.get()))
        is_wrong = build.ir.icmp_signed("!=", beyond.get(), zero)
        with build.ir.if_then(is_wrong):
            build.put_int(given["halt"], one)
            with build.loop(slots) as slot:
                build.put_int(build.at(given["places"], (slot, 8)), build.const(-1))
        slots = build.ir.select(is_wrong, zero, slots)
        with build.loop(given["experts"]) as expert:
            build.put_int(build.at(given["counts"], (expert, 8)), zero)
        with build.loop(slots) as slot:
            expert = build.short_int_at(build.at(given["local_ids"], (slot, 4)))
            with build.ir.if_then(build.ir.icmp_signed(">=", expert, zero)):
                count = build.at(given["counts"], (expert, 8))
                build.put_int(count, build.ir.add(build.int_at(count), one))
        total = build.variable(zero)
        with build.loop(given["experts"]) as expert:
            build.put_int(build.at(given["ends"], (expert, 8)), total.get())
            total.set(build.ir.add(total.get(), build.int_at(build.at(given["counts"], (expert, 8)))))
        build.put_int(given["pairs"], build.ir.select(is_wrong, build.const(-1), total.get()))
        with build.loop(slots) as slot:
            expert = build.short_int_at(build.at(given["local_ids"], (slot, 4)))
            place = build.at(given["places"], (slot, 8))
            with build.ir.if_else(build.ir.icmp_signed(">=", expert, zero)) as (named, unnamed):
                with named:
                    end = build.at(given["ends"], (expert, 8))
                    build.put_int(place, build.int_at(end))
                    build.put_int(end, build.ir.add(build.int_at(end), one))
                with unnamed:
                    build.put_int(place, build.const(-1))
    return TeamFunction(build.finish())


GATHER_ARGUMENTS = (
    "rows",  # address of R
    "hidden",  # address of bfloat16 [R, H]
    "places",  # address of int64 [R, K]
    "out",  # address of [P, H]: bfloat16, or uint8 when quantized
    "scales",  # address of float32 [P]; quantized only
    "size",  # H
    "top_k",  # K
)


@functools.cache
def gather_rows(quantized: bool = False) -> TeamFunction:
    """Copies each row to the places of its pairs; quantized as model_shards.packing does. Pieces are rows."""
    build = Builder(GATHER_ARGUMENTS)
    given = build.arguments
    size = given["size"]
    row_bytes = build.ir.mul(size, build.const(2))
    with build.pieces(build.int_at(given["rows"])) as row, build.loop(given["top_k"]) as k:
        slot = build.ir.add(build.ir.mul(row, given["top_k"]), k)
        place = build.int_at(build.at(given["places"], (slot, 8)))
        with build.ir.if_then(build.ir.icmp_signed(">=", place, build.const(0))):
            hidden = build.at(given["hidden"], (row, row_bytes))
            if quantized:
                out = build.at(given["out"], (place, size))
                quantize_row(build, hidden, Kind.BFLOAT16, size, out, build.at(given["scales"], (place, 4)))
            else:
                build.copy(hidden, build.at(given["out"], (place, row_bytes)), row_bytes)
    return TeamFunction(build.finish())


SUM_ARGUMENTS = (
    "rows",  # address of R
    "outputs",  # address of float32 [P, ...], of whose rows the first H are read
    "outputs_row",  # bytes from row to row
    "places",  # address of int64 [R, K]
    "weights",  # address of float32 [R, K]
    "out",  # address of bfloat16 [R, H]
    "size",  # H
    "top_k",  # K
)


@functools.cache
def sum_pairs() -> TeamFunction:
    """The weighted sum of each row's pairs, in the order of its slots; zeros without any. Pieces are rows."""
    build = Builder(SUM_ARGUMENTS)
    given = build.arguments
    size = given["size"]
    with build.pieces(build.int_at(given["rows"])) as row:
        first = build.ir.mul(row, given["top_k"])
        out = build.at(given["out"], (row, build.ir.mul(size, build.const(2))))
        with build.loop(size, step=LANES) as i:
            total = build.variable(build.numbers(0.0))
            with build.loop(given["top_k"]) as k:
                slot = build.ir.add(first, k)
                place = build.int_at(build.at(given["places"], (slot, 8)))
                with build.ir.if_then(build.ir.icmp_signed(">=", place, build.const(0))):
                    weight = build.spread(build.float_at(build.at(given["weights"], (slot, 4))))
                    element = build.at(given["outputs"], (place, given["outputs_row"]), (i, 4))
                    value = build.load(element, Kind.FLOAT32)
                    total.set(build.fma(value, weight, total.get()))
            build.store(build.at(out, (i, 2)), total.get(), Kind.BFLOAT16)
    return TeamFunction(build.finish())
