"""The text of a grouped product in LLVM's intermediate representation (https://llvm.org/docs/LangRef.html).

    rows of x       counts[0] of matrix 0 | counts[1] of matrix 1 | ...
    a matrix        tile 0: word 0 of `width` outputs, word 1 of them, ... | tile 1 | ...         read once, in order
    tile_R          R rows of x times one tile: R x vectors registers of sums, kept there for all words

Threads take every n-th tile of each matrix. A tile is multiplied by all rows of its matrix while it lies in the cache.
"""

from collections.abc import Sequence

from model_shards.kernels.instructions import Arithmetic, Instructions

# What a call is told, in this order: eight bytes each.
ARGUMENTS = (
    "x",  # address of rows of words * word_operand_bytes
    "x_row",  # bytes from row to row
    "x_matrix",  # bytes from a matrix's first row to the next one's, beside the rows that `apart` counts
    "x_apart",  # 1: a matrix's rows come after those of the matrices before; 0: they begin where those do
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
    """Defines `share` (model_shards.kernels.machine_code): pieces are tiles of each matrix.

    Narrow: what is written is rounded to bfloat16; only of DOT.
    """
    return "\n".join([DECLARATIONS, *tiles(how, narrow), _matrices(how, narrow)])


def load_arguments(names: Sequence[str]) -> str:
    """%name of each of `%arguments`, eight bytes one after another."""
    return "\n".join(
        f"  %{name}_at = getelementptr i64, ptr %arguments, i64 {index}\n  %{name} = load i64, ptr %{name}_at"
        for index, name in enumerate(names)
    )


def splat(name: str, scalar: str, kind: str, lanes: int) -> str:
    """%name: the scalar in every lane."""
    vector = f"<{lanes} x {kind}>"
    return (
        f"  %{name}_v = insertelement {vector} poison, {kind} {scalar}, i32 0\n"
        f"  %{name} = shufflevector {vector} %{name}_v, {vector} poison, <{lanes} x i32> zeroinitializer"
    )


def rest_of_rows(how: Instructions, passed: str, then: str) -> str:
    """Fewer rows than a tile has, %left of them: `tile_R` of what is `passed`, then on to the label `then`."""
    rest = range(1, how.rows)
    cases = " ".join(f"i64 {rows}, label %rest{rows}" for rows in rest)
    calls = "\n".join(f"rest{rows}:\n  call void @tile_{rows}({passed})\n  br label %{then}" for rows in rest)
    return f"  switch i64 %left, label %{then} [ {cases} ]\n{calls}"


def tiles(how: Instructions, narrow: bool = False) -> list[str]:
    """Defines `tile_R` of every number of rows."""
    return [_tile(how, rows, narrow) for rows in range(1, how.rows + 1)]


DECLARATIONS = """
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)
declare <16 x bfloat> @llvm.x86.avx512bf16.cvtneps2bf16.512(<16 x float>)
declare <16 x i32> @llvm.x86.avx512.vpdpbusd.512(<16 x i32>, <16 x i32>, <16 x i32>)
declare <8 x i32> @llvm.x86.avx512.vpdpbusd.256(<8 x i32>, <8 x i32>, <8 x i32>)
declare <16 x float> @llvm.fma.v16f32(<16 x float>, <16 x float>, <16 x float>)
declare <8 x float> @llvm.fma.v8f32(<8 x float>, <8 x float>, <8 x float>)
attributes #0 = { nounwind "prefer-vector-width"="512" }"""


def _matrices(how: Instructions, narrow: bool) -> str:
    """Over matrices, over every `step`-th tile of each from `first`, over its rows."""
    passed = "ptr %x_rows, ptr %tile, ptr %out_rows, i64 %words, i64 %x_row, i64 %out_row, "
    passed += "ptr %tile_zeros, ptr %tile_scales, ptr %x_scales"
    return f"""
define void @share(ptr %arguments, i64 %first, i64 %step) #0 {{
entry:
{load_arguments(ARGUMENTS)}
  %outputs = mul i64 %tiles, {how.width}
  %matrix_columns = mul i64 %outputs, 4
  %tile_bytes = mul i64 %words, {4 * how.width}
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
  %has_rows = icmp ne i64 %count, 0
  %has_tiles = icmp ult i64 %first, %tiles
  %has_work = and i1 %has_rows, %has_tiles
  br i1 %has_work, label %tile_of, label %matrix_done
tile_of:
  %t = phi i64 [%first, %matrix], [%t_next, %tile_done]
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
  br label %rows_of
rows_of:
  %r = phi i64 [0, %tile_of], [%r_next, %full]
  %p = add i64 %row, %r
  %x_first = mul i64 %row, %x_apart
  %x_p = add i64 %x_first, %r
  %x_off = mul i64 %x_p, %x_row
  %x_i = add i64 %x_e, %x_off
  %x_rows = inttoptr i64 %x_i to ptr
  %out_first = mul i64 %row, %out_apart
  %out_p = add i64 %out_first, %r
  %out_off = mul i64 %out_p, %out_row
  %out_i = add i64 %out_e, %out_off
  %out_j = add i64 %out_i, %out_column
  %out_rows = inttoptr i64 %out_j to ptr
  %x_scales_off = mul i64 %p, 4
  %x_scales_i = add i64 %row_scales, %x_scales_off
  %x_scales = inttoptr i64 %x_scales_i to ptr
  %left = sub i64 %count, %r
  %is_full = icmp uge i64 %left, {how.rows}
  br i1 %is_full, label %full, label %rest
full:
  call void @tile_{how.rows}({passed})
  %r_next = add i64 %r, {how.rows}
  br label %rows_of
rest:
{rest_of_rows(how, passed, "tile_done")}
tile_done:
  %t_next = add i64 %t, %step
  %t_more = icmp ult i64 %t_next, %tiles
  br i1 %t_more, label %tile_of, label %matrix_done
matrix_done:
  %e_next = add i64 %e, 1
  %row_next = add i64 %row, %count
  %e_more = icmp ult i64 %e_next, %num_matrices
  br i1 %e_more, label %matrix, label %done
done:
  ret void
}}"""


def _tile(how: Instructions, rows: int, narrow: bool) -> str:
    """`rows` rows of x times one tile."""
    lanes = how.lanes
    sums = f"<{lanes} x {'i32' if how.arithmetic is Arithmetic.INTEGER else 'float'}>"
    pairs = [(row, vector) for row in range(rows) for vector in range(how.vectors)]
    lines = [
        f"define internal void @tile_{rows}(ptr %x, ptr %w, ptr %out, i64 %words, i64 %x_row, i64 %out_row, "
        "ptr %zeros, ptr %scales, ptr %x_scales) #0 {",
        "entry:",
    ]
    for row in range(rows):
        lines += [
            f"  %xo{row} = mul i64 %x_row, {row}",
            f"  %x{row} = getelementptr i8, ptr %x, i64 %xo{row}",
            f"  %oo{row} = mul i64 %out_row, {row}",
            f"  %o{row} = getelementptr i8, ptr %out, i64 %oo{row}",
        ]
    lines += ["  br label %loop", "loop:", "  %k = phi i64 [0, %entry], [%k_next, %loop]"]
    lines += [f"  %s{r}_{v} = phi {sums} [zeroinitializer, %entry], [%n{r}_{v}, %loop]" for r, v in pairs]
    lines += [f"  %wo = mul i64 %k, {4 * how.width}", "  %wk = getelementptr i8, ptr %w, i64 %wo"]
    for vector in range(how.vectors):
        lines += [
            f"  %wp{vector} = getelementptr i8, ptr %wk, i64 {4 * lanes * vector}",
            f"  %w{vector} = load <{lanes} x i32>, ptr %wp{vector}, align {4 * lanes}",
        ]
    step = {Arithmetic.DOT: _dot, Arithmetic.WIDEN: _widen, Arithmetic.INTEGER: _integer}[how.arithmetic]
    lines += step(how, rows)
    lines += [
        "  %k_next = add nuw i64 %k, 1",
        "  %more = icmp ult i64 %k_next, %words",
        "  br i1 %more, label %loop, label %finish",
        "finish:",
    ]
    if how.arithmetic is Arithmetic.INTEGER:
        lines += _scaled(how, rows)
    for row, vector in pairs:
        if narrow:
            lines += _narrowed(how, row, vector)
            continue
        value = "y" if how.arithmetic is Arithmetic.INTEGER else "n"
        lines += [
            f"  %op{row}_{vector} = getelementptr i8, ptr %o{row}, i64 {4 * lanes * vector}",
            f"  store <{lanes} x float> %{value}{row}_{vector}, ptr %op{row}_{vector}, align 4",
        ]
    return "\n".join([*lines, "  ret void", "}"])


def _narrowed(how: Instructions, row: int, vector: int) -> list[str]:
    at = f"{row}_{vector}"
    halves = f"<{how.lanes} x bfloat>"
    convert = f"@llvm.x86.avx512bf16.cvtneps2bf16.{32 * how.lanes}"
    return [
        f"  %b{at} = call {halves} {convert}(<{how.lanes} x float> %n{at})",
        f"  %op{at} = getelementptr i8, ptr %o{row}, i64 {2 * how.lanes * vector}",
        f"  store {halves} %b{at}, ptr %op{at}, align 2",
    ]


def _spread(name: str, kind: str, lanes: int, address: str) -> list[str]:
    """%name: the value at %address in every lane."""
    return [f"  %{name}_1 = load {kind}, ptr %{address}, align 1", splat(name, f"%{name}_1", kind, lanes)]


def _dot(how: Instructions, rows: int) -> list[str]:
    lanes = how.lanes
    halves = f"<{2 * lanes} x bfloat>"
    lines = [f"  %h{v} = bitcast <{lanes} x i32> %w{v} to {halves}" for v in range(how.vectors)]
    for row in range(rows):
        lines.append(f"  %xp{row} = getelementptr i32, ptr %x{row}, i64 %k")
        lines += _spread(f"xw{row}", "i32", lanes, f"xp{row}")
        lines.append(f"  %xh{row} = bitcast <{lanes} x i32> %xw{row} to {halves}")
        lines += [
            f"  %n{row}_{v} = call <{lanes} x float> @llvm.x86.avx512bf16.dpbf16ps.{32 * lanes}"
            f"(<{lanes} x float> %s{row}_{v}, {halves} %h{v}, {halves} %xh{row})"
            for v in range(how.vectors)
        ]
    return lines


def _widen(how: Instructions, rows: int) -> list[str]:
    lanes = how.lanes
    floats, words = f"<{lanes} x float>", f"<{lanes} x i32>"
    lines = [splat("sixteen", "16", "i32", lanes), splat("upper", "-65536", "i32", lanes)]
    for v in range(how.vectors):
        lines += [
            f"  %even{v}_i = shl {words} %w{v}, %sixteen",
            f"  %even{v} = bitcast {words} %even{v}_i to {floats}",
            f"  %odd{v}_i = and {words} %w{v}, %upper",
            f"  %odd{v} = bitcast {words} %odd{v}_i to {floats}",
        ]
    for row in range(rows):
        lines += [
            f"  %xe{row} = getelementptr i64, ptr %x{row}, i64 %k",
            f"  %xd{row} = getelementptr i8, ptr %xe{row}, i64 4",
        ]
        lines += _spread(f"xeven{row}", "float", lanes, f"xe{row}") + _spread(f"xodd{row}", "float", lanes, f"xd{row}")
        for v in range(how.vectors):
            fma = f"call {floats} @llvm.fma.v{lanes}f32({floats} "
            lines += [
                f"  %m{row}_{v} = {fma}%even{v}, {floats} %xeven{row}, {floats} %s{row}_{v})",
                f"  %n{row}_{v} = {fma}%odd{v}, {floats} %xodd{row}, {floats} %m{row}_{v})",
            ]
    return lines


def _integer(how: Instructions, rows: int) -> list[str]:
    words = f"<{how.lanes} x i32>"
    lines = []
    for row in range(rows):
        lines.append(f"  %xp{row} = getelementptr i32, ptr %x{row}, i64 %k")
        lines += _spread(f"xw{row}", "i32", how.lanes, f"xp{row}")
        lines += [
            f"  %n{row}_{v} = call {words} @llvm.x86.avx512.vpdpbusd.{32 * how.lanes}"
            f"({words} %s{row}_{v}, {words} %xw{row}, {words} %w{v})"
            for v in range(how.vectors)
        ]
    return lines


def _scaled(how: Instructions, rows: int) -> list[str]:
    """%y: sums without what the zero point added, times the scales of output and row."""
    lanes = how.lanes
    floats, words = f"<{lanes} x float>", f"<{lanes} x i32>"
    lines = []
    for v in range(how.vectors):
        lines += [
            f"  %zp{v} = getelementptr i8, ptr %zeros, i64 {4 * lanes * v}",
            f"  %z{v} = load {words}, ptr %zp{v}, align 4",
            f"  %cp{v} = getelementptr i8, ptr %scales, i64 {4 * lanes * v}",
            f"  %c{v} = load {floats}, ptr %cp{v}, align 4",
        ]
    for row in range(rows):
        lines.append(f"  %xsp{row} = getelementptr float, ptr %x_scales, i64 {row}")
        lines += _spread(f"xs{row}", "float", lanes, f"xsp{row}")
        for v in range(how.vectors):
            lines += [
                f"  %d{row}_{v} = sub {words} %n{row}_{v}, %z{v}",
                f"  %f{row}_{v} = sitofp {words} %d{row}_{v} to {floats}",
                f"  %g{row}_{v} = fmul {floats} %f{row}_{v}, %c{v}",
                f"  %y{row}_{v} = fmul {floats} %g{row}_{v}, %xs{row}",
            ]
    return lines
