"""Attention of decodes with vector instructions: `decode_ir` for each piece that `decode_parts` gives a thread."""

import functools

from model_shards.kernels.builder import Builder, Kind
from model_shards.kernels.decode_ir import ARGUMENTS, decode_ir
from model_shards.kernels.decode_parts import ARGUMENTS as DECODE_ARGUMENTS
from model_shards.kernels.decode_parts import HEADS, pieces_of_decodes, put_result
from model_shards.kernels.machine_code import TeamFunction
from model_shards.kernels.quantized_latents import QuantizedRow, widen


def decode_vectors(rank: int, row: QuantizedRow | None = None) -> TeamFunction:
    """Of the calls whose arguments are `decode_parts.ARGUMENTS`.

    `row`: how latents lie that are widened first, a chunk at a time; None: they are bfloat16.
    """
    piece_name = "decode_piece" if row is None else f"decode_piece_{row.widen_name}"
    build = Builder(DECODE_ARGUMENTS)
    given = build.arguments
    peaks, totals, sums = (build.array(size) for size in (HEADS, HEADS, HEADS * rank))
    with pieces_of_decodes(build, rank) as piece:
        values = {
            **given,
            "latent_queries": piece.latent_queries,
            "rope_queries": piece.rope_queries,
            "heads": piece.heads,
            "blocks": piece.blocks,
            "length": piece.length,
            "rank": build.const(rank),
            "peaks": peaks,
            "totals": totals,
            "sums": sums,
        }
        build.run(piece_name, ARGUMENTS, values)
        largest, total = build.load(peaks, Kind.FLOAT32), build.load(totals, Kind.FLOAT32)
        put_result(build, piece, rank, largest, total, sums)
    return TeamFunction(build.finish(), {piece_name: _of_a_piece(row)})


@functools.cache
def _of_a_piece(row: QuantizedRow | None) -> TeamFunction:
    if row is None:
        return TeamFunction(decode_ir())
    return TeamFunction(decode_ir(row.widen_name), {row.widen_name: widen(row)})
