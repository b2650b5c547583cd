"""Attention of decodes with vector instructions: `decode_ir` for each piece that `decode_parts` gives a thread."""

from model_shards.kernels.builder import Builder, Kind
from model_shards.kernels.decode_ir import ARGUMENTS, decode_ir
from model_shards.kernels.decode_parts import ARGUMENTS as DECODE_ARGUMENTS
from model_shards.kernels.decode_parts import HEADS, pieces, put_result
from model_shards.kernels.machine_code import TeamFunction
from model_shards.kernels.quantized_latents import QuantizedRow, widen


def decode_vectors(rank: int, row: QuantizedRow | None = None) -> TeamFunction:
    """Of the calls whose arguments are `decode_parts.ARGUMENTS`.

    `row`: how latents lie that are widened first, a chunk at a time; None: they are bfloat16.
    """
    if row is None:
        piece_name, of_a_piece = "decode_piece", TeamFunction(decode_ir())
    else:
        piece_name = f"decode_piece_{row.widen_name}"
        of_a_piece = TeamFunction(decode_ir(row.widen_name), {row.widen_name: widen(row)})
    build = Builder(DECODE_ARGUMENTS)
    given = build.arguments
    told, peaks, totals, sums = (build.array(size) for size in (2 * len(ARGUMENTS), HEADS, HEADS, HEADS * rank))
    with pieces(build, rank) as piece:
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
        for index, name in enumerate(ARGUMENTS):
            build.put_int(build.at(told, (build.const(index), 8)), values[name])
        build.run(piece_name, told)
        largest, total = build.load(peaks, Kind.FLOAT32), build.load(totals, Kind.FLOAT32)
        put_result(build, piece, rank, largest, total, sums)
    return TeamFunction(build.finish(), {piece_name: of_a_piece})
