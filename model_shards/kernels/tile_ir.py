"""The text of the product of some rows and one tile of a matrix, in LLVM's intermediate representation.

    rows      any number of rows of x times the tile: as many of the calls below as it takes
    tile_R    R rows times the tile: R x vectors registers of sums, kept there for all words

See model_shards.kernels.product_ir for how the matrix lies, and model_shards.kernels.amx_ir for CPUs with AMX.
"""

from model_shards.kernels.instructions import Arithmetic, Instructions

# What `rows` is told; a tile the same without the first and the last.
TILE_ARGUMENTS = (
    "ptr %x, ptr %w, ptr %out, i64 %words, i64 %x_row, i64 %out_row, ptr %zeros, ptr %scales, ptr %x_scales"
)
ROWS_ARGUMENTS = f"i64 %count, {TILE_ARGUMENTS}, ptr %configured"

DECLARATIONS = """
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)
declare <16 x bfloat> @llvm.x86.avx512bf16.cvtneps2bf16.512(<16 x float>)
declare <16 x i32> @llvm.x86.avx512.vpdpbusd.512(<16 x i32>, <16 x i32>, <16 x i32>)
declare <8 x i32> @llvm.x86.avx512.vpdpbusd.256(<8 x i32>, <8 x i32>, <8 x i32>)
declare <16 x float> @llvm.fma.v16f32(<16 x float>, <16 x float>, <16 x float>)
declare <8 x float> @llvm.fma.v8f32(<8 x float>, <8 x float>, <8 x float>)
attributes #0 = { nounwind "prefer-vector-width"="512" }"""


def vector_rows(how: Instructions, narrow: bool = False) -> list[str]:
    """Defines `rows` and what it calls."""
    return [*(_tile(how, rows, narrow) for rows in range(1, how.rows + 1)), _rows(how)]


def _rows(how: Instructions) -> str:
    passed = "ptr %x_r, ptr %w, ptr %out_r, i64 %words, i64 %x_row, i64 %out_row, "
    passed += "ptr %zeros, ptr %scales, ptr %row_scales"
    rest = range(1, how.rows)
    cases = " ".join(f"i64 {rows}, label %rest{rows}" for rows in rest)
    calls = "\n".join(f"rest{rows}:\n  call void @tile_{rows}({passed})\n  br label %done" for rows in rest)
    return f"""
define internal void @rows({ROWS_ARGUMENTS}) #0 {{
entry:
  br label %next
next:
  %r = phi i64 [0, %entry], [%r_next, %full]
  %x_off = mul i64 %r, %x_row
  %x_r = getelementptr i8, ptr %x, i64 %x_off
  %out_off = mul i64 %r, %out_row
  %out_r = getelementptr i8, ptr %out, i64 %out_off
  %row_scales = getelementptr float, ptr %x_scales, i64 %r
  %left = sub i64 %count, %r
  %is_full = icmp uge i64 %left, {how.rows}
  br i1 %is_full, label %full, label %rest
full:
  call void @tile_{how.rows}({passed})
  %r_next = add i64 %r, {how.rows}
  br label %next
rest:
  switch i64 %left, label %done [ {cases} ]
{calls}
done:
  ret void
}}"""


def splat(name: str, scalar: str, kind: str, lanes: int) -> str:
    """%name: the scalar in every lane."""
    vector = f"<{lanes} x {kind}>"
    return (
        f"  %{name}_v = insertelement {vector} poison, {kind} {scalar}, i32 0\n"
        f"  %{name} = shufflevector {vector} %{name}_v, {vector} poison, <{lanes} x i32> zeroinitializer"
    )


def _tile(how: Instructions, rows: int, narrow: bool) -> str:
    """`rows` rows of x times one tile."""
    lanes = how.lanes
    sums = f"<{lanes} x {'i32' if how.arithmetic is Arithmetic.INTEGER else 'float'}>"
    pairs = [(row, vector) for row in range(rows) for vector in range(how.vectors)]
    lines = [
        f"define internal void @tile_{rows}({TILE_ARGUMENTS}) #0 {{",
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
    return "\n".join([*lines, *written(how, rows, narrow), "  ret void", "}"])


def written(how: Instructions, rows: int, narrow: bool) -> list[str]:
    """Writes %n{row}_{vector}, the sums of so many rows, to %o{row}; scaled, if they are integers, or rounded."""
    lines = _scaled(how, rows) if how.arithmetic is Arithmetic.INTEGER else []
    value = "y" if how.arithmetic is Arithmetic.INTEGER else "n"
    for row in range(rows):
        for vector in range(how.vectors):
            if narrow:
                lines += _narrowed(how, row, vector)
                continue
            at = f"{row}_{vector}"
            lines += [
                f"  %op{at} = getelementptr i8, ptr %o{row}, i64 {4 * how.lanes * vector}",
                f"  store <{how.lanes} x float> %{value}{at}, ptr %op{at}, align 4",
            ]
    return lines


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
