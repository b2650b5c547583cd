"""The text of a grouped product in LLVM's intermediate representation (https://llvm.org/docs/LangRef.html).

    rows of x       counts[0] of matrix 0 | counts[1] of matrix 1 | ...
    a matrix        tile 0: word 0 of `width` outputs, word 1 of them, ... | tile 1 | ...

Each thread takes a run of the tiles of each matrix, and reads it in order; where all matrices have as many rows, those
of heads, a run of the tiles of all, so that what it reads lies together. A tile is multiplied by all rows of its matrix
while it lies in the cache.
"""

from collections.abc import Sequence

from model_shards.kernels.amx_ir import RELEASE, amx_rows
from model_shards.kernels.instructions import Instructions
from model_shards.kernels.tile_ir import DECLARATIONS, vector_rows

# What a call is told, in this order: eight bytes each.
ARGUMENTS = (
    "x",  # address of rows of words * word_operand_bytes
    "x_row",  # bytes from row to row
    "x_matrix",  # bytes from a matrix's first row to the next one's, beside the rows that `apart` counts
    "x_apart",  # 1: a matrix's rows come after those of the matrices before; 0: they begin where those do, as many
    "out",  # address of rows of which the first tiles * width numbers are written: float32, or bfloat16 when narrow
    "out_row",  # bytes from row to row
    "out_matrix",  # as x_matrix
    "out_apart",  # as x_apart
    "weights",  # address of the first matrix
    "matrix_bytes",
    "counts",  # address of E numbers of rows
    "num_matrices",  # E
    "words",
    "tiles",
    "zero_sums",  # int8: address of [E, tiles * width] int32, what a zero point of x adds to each output
    "scales",  # int8: address of [E, tiles * width] float32, of an output
    "row_scales",  # int8: address of [P] float32
)


def product_ir(how: Instructions, narrow: bool = False) -> str:
    """Defines `share` (model_shards.kernels.machine_code): a piece is a run of the tiles of each matrix, or of all.

    Narrow: what is written is rounded to bfloat16; only of DOT.
    """
    return "\n".join([*rows_ir(how, narrow, streams=True), _matrices(how, narrow)])


def rows_ir(how: Instructions, narrow: bool = False, streams: bool = False) -> list[str]:
    """Defines `rows` of these instructions (model_shards.kernels.tile_ir); `streams`: tiles come from memory."""
    if how.amx:
        return [DECLARATIONS, *amx_rows(how, narrow, streams)]
    return [DECLARATIONS, *vector_rows(how, narrow)]


def load_arguments(names: Sequence[str]) -> str:
    """%name of each of `%arguments`, eight bytes one after another."""
    return "\n".join(
        f"  %{name}_at = getelementptr i64, ptr %arguments, i64 {index}\n  %{name} = load i64, ptr %{name}_at"
        for index, name in enumerate(names)
    )


def _matrices(how: Instructions, narrow: bool) -> str:
    """Over matrices, over this thread's tiles of each, over its rows."""
    passed = "i64 %count, ptr %x_rows, ptr %tile, ptr %out_rows, i64 %words, i64 %x_row, i64 %out_row, "
    passed += "ptr %tile_zeros, ptr %tile_scales, ptr %x_scales, ptr %configured"
    return f"""
declare i64 @llvm.smax.i64(i64, i64)
declare i64 @llvm.smin.i64(i64, i64)
define void @share(ptr %arguments, i64 %first, i64 %step) #0 {{
entry:
{load_arguments(ARGUMENTS)}
  %configured = alloca i64
  store i64 0, ptr %configured
  %outputs = mul i64 %tiles, {how.width}
  %matrix_columns = mul i64 %outputs, 4
  %tile_bytes = mul i64 %words, {4 * how.width}
  %runs_on = icmp eq i64 %x_apart, 0
  %tiles_of_all = mul i64 %tiles, %num_matrices
  %shared_tiles = select i1 %runs_on, i64 %tiles_of_all, i64 %tiles
  %tiles_before = select i1 %runs_on, i64 %tiles, i64 0
  %begin_off = mul i64 %shared_tiles, %first
  %begin = udiv i64 %begin_off, %step
  %end_off = add i64 %begin_off, %shared_tiles
  %end = udiv i64 %end_off, %step
  br label %matrix
matrix:
  %e = phi i64 [0, %entry], [%e_next, %matrix_done]
  %row = phi i64 [0, %entry], [%row_next, %matrix_done]
  %counts_p = inttoptr i64 %counts to ptr
  %count_at = getelementptr i64, ptr %counts_p, i64 %e
  %count = load i64, ptr %count_at
  %weights_off = mul i64 %e, %matrix_bytes
  %weights_e = add i64 %weights, %weights_off
  %columns_off = mul i64 %e, %matrix_columns
  %zeros_e = add i64 %zero_sums, %columns_off
  %scales_e = add i64 %scales, %columns_off
  %before = mul i64 %e, %tiles_before
  %begin_here = sub i64 %begin, %before
  %end_here = sub i64 %end, %before
  %start = call i64 @llvm.smax.i64(i64 %begin_here, i64 0)
  %stop = call i64 @llvm.smin.i64(i64 %end_here, i64 %tiles)
  %has_rows = icmp ne i64 %count, 0
  %has_tiles = icmp slt i64 %start, %stop
  %has_work = and i1 %has_rows, %has_tiles
  br i1 %has_work, label %tile_of, label %matrix_done
tile_of:
  %t = phi i64 [%start, %matrix], [%t_next, %tile_of]
  %tile_off = mul i64 %t, %tile_bytes
  %tile_i = add i64 %weights_e, %tile_off
  %tile = inttoptr i64 %tile_i to ptr
  %column_off = mul i64 %t, {4 * how.width}
  %tile_zeros_i = add i64 %zeros_e, %column_off
  %tile_zeros = inttoptr i64 %tile_zeros_i to ptr
  %tile_scales_i = add i64 %scales_e, %column_off
  %tile_scales = inttoptr i64 %tile_scales_i to ptr
  %x_off_e = mul i64 %e, %x_matrix
  %x_e = add i64 %x, %x_off_e
  %out_off_e = mul i64 %e, %out_matrix
  %out_e = add i64 %out, %out_off_e
  %out_column = mul i64 %t, {(2 if narrow else 4) * how.width}
  %x_first = mul i64 %row, %x_apart
  %x_off = mul i64 %x_first, %x_row
  %x_i = add i64 %x_e, %x_off
  %x_rows = inttoptr i64 %x_i to ptr
  %out_first = mul i64 %row, %out_apart
  %out_off = mul i64 %out_first, %out_row
  %out_i = add i64 %out_e, %out_off
  %out_j = add i64 %out_i, %out_column
  %out_rows = inttoptr i64 %out_j to ptr
  %x_scales_off = mul i64 %row, 4
  %x_scales_i = add i64 %row_scales, %x_scales_off
  %x_scales = inttoptr i64 %x_scales_i to ptr
  call void @rows({passed})
  %t_next = add i64 %t, 1
  %t_more = icmp ult i64 %t_next, %stop
  br i1 %t_more, label %tile_of, label %matrix_done
matrix_done:
  %e_next = add i64 %e, 1
  %row_next = add i64 %row, %count
  %e_more = icmp ult i64 %e_next, %num_matrices
  br i1 %e_more, label %matrix, label %done
done:
{RELEASE if how.amx else ""}
  ret void
}}"""
