"""The text of the product of some rows and one tile of a matrix with AMX, as model_shards.kernels.tile_ir.

AMX has eight registers of up to 16 rows of 64 bytes, which are told by number (Intel 64 and IA-32 Architectures
Software Developer's Manual, volume 1, chapter 18). A register holds 16 words of 16 rows of x, or those of 16 outputs as
they lie, a word of all 16 a row; or the sums of 16 rows and 16 outputs. Sums stay there for all words:

    tile    16 rows and the four columns of 16 outputs:                     4 of sums, 1 of x, 3 of the matrix
    pair    twice 16 rows and two columns, and once again for the others:   4 of sums, 2 of x, 2 of the matrix

A pair reads the matrix from the cache once for 32 rows. How many rows registers have is configured, by all of them at
once, and only when it changes: more than 16 rows are taken 16 by 16, the last of them again if need be. What is written
twice is the same.
"""

from model_shards.kernels.instructions import AMX_ROWS, AMX_WORDS, Arithmetic, Instructions
from model_shards.kernels.tile_ir import ROWS_ARGUMENTS, TILE_ARGUMENTS, written

_ROW_BYTES = 64
_CONFIG_BYTES = 64
_LINE = 64  # bytes of the cache
_SUMS = 4  # registers of them; the next is of x, and the others of the matrix, but in a pair one more of x

# Gives the registers back: the kernel then has less to save at a switch, and other code finds them as it left them.
RELEASE = "  call void @llvm.x86.tilerelease()"

_DECLARATIONS = """
declare void @llvm.x86.ldtilecfg(ptr)
declare void @llvm.x86.tilerelease()
declare void @llvm.x86.tilezero(i8)
declare void @llvm.x86.tileloadd64(i8, ptr, i64)
declare void @llvm.x86.tilestored64(i8, ptr, i64)
declare void @llvm.x86.tdpbf16ps(i8, i8, i8)
declare void @llvm.x86.tdpbusd(i8, i8, i8)
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)
declare i64 @llvm.umin.i64(i64, i64)"""


def amx_rows(how: Instructions, narrow: bool = False, streams: bool = False) -> list[str]:
    """Defines `rows` and what it calls. %configured is the address of an i64: for how many rows it was, 0 at first.

    `streams`: the tile comes from memory, and the next one lies behind it.
    """
    kinds = (("tile", 1, False), ("pair", 2, False), ("first_tile", 1, streams), ("first_pair", 2, streams))
    products = [_product(how, narrow, name, groups, ahead) for name, groups, ahead in kinds]
    return [_DECLARATIONS, _configurations(), *products, _finish(how, narrow), _rows()]


def _configurations() -> str:
    """@configurations: one for each number of rows."""
    table = b"".join(_configuration(rows) for rows in range(1, AMX_ROWS + 1))
    text = "".join(f"\\{byte:02x}" for byte in table)
    return f'@configurations = internal constant [{len(table)} x i8] c"{text}", align 64'


def _configuration(rows: int) -> bytes:
    """The palette, then bytes of a row and rows of each register."""
    widths = _ROW_BYTES.to_bytes(2, "little") * 8
    heights = bytes([rows] * _SUMS + [rows, *[AMX_WORDS] * 3])
    return (bytes([1]).ljust(16, b"\0") + widths.ljust(32, b"\0") + heights).ljust(_CONFIG_BYTES, b"\0")


def _rows() -> str:
    return f"""
define internal void @rows({ROWS_ARGUMENTS}) #0 {{
entry:
  %is_few = icmp ult i64 %count, {AMX_ROWS}
  %rows = select i1 %is_few, i64 %count, i64 {AMX_ROWS}
  %last = sub i64 %count, %rows
  %any = icmp ne i64 %count, 0
  br i1 %any, label %check, label %done
check:
  %was = load i64, ptr %configured
  %is_same = icmp eq i64 %was, %rows
  br i1 %is_same, label %begin, label %configure
configure:
  %before = sub i64 %rows, 1
  %config_off = mul i64 %before, {_CONFIG_BYTES}
  %config = getelementptr i8, ptr @configurations, i64 %config_off
  call void @llvm.x86.ldtilecfg(ptr %config)
  store i64 %rows, ptr %configured
  br label %begin
begin:
  %pairs = icmp ugt i64 %count, {AMX_ROWS}
  br i1 %pairs, label %begin_pair, label %begin_tile
begin_tile:
  call void @first_tile({_passed("0")})
  br label %done
begin_pair:
  %second = call i64 @llvm.umin.i64(i64 {AMX_ROWS}, i64 %last)
  call void @first_pair({_passed("0")}, i64 %second)
  br label %next
next:
  %first = phi i64 [{2 * AMX_ROWS}, %begin_pair], [%first_next, %next_done]
  %following = add i64 %first, {AMX_ROWS}
  %first_next = add i64 %first, {2 * AMX_ROWS}
  %left = icmp ult i64 %first, %count
  br i1 %left, label %any_left, label %done
any_left:
  %r = call i64 @llvm.umin.i64(i64 %first, i64 %last)
  %is_pair = icmp ult i64 %following, %count
  br i1 %is_pair, label %next_pair, label %next_tile
next_pair:
  %also = call i64 @llvm.umin.i64(i64 %following, i64 %last)
  call void @pair({_passed("%r")}, i64 %also)
  br label %next_done
next_tile:
  call void @tile({_passed("%r")})
  br label %next_done
next_done:
  br label %next
done:
  ret void
}}"""


def _passed(row: str) -> str:
    return (
        "ptr %x, ptr %w, ptr %out, i64 %words, i64 %x_row, i64 %out_row, ptr %zeros, ptr %scales, ptr %x_scales, "
        f"i64 %rows, i64 {row}"
    )


def _product(how: Instructions, narrow: bool, name: str, groups: int, ahead: bool) -> str:
    """As many rows as are configured, from %r0 on, and in a pair from %r1 on; `ahead`: asks memory for what follows."""
    also = "" if groups == 1 else ", i64 %r1"
    direct = how.arithmetic is not Arithmetic.INTEGER and not narrow
    columns = _SUMS // groups  # at once
    lines = [
        f"define internal void @{name}({TILE_ARGUMENTS}, i64 %rows, i64 %r0{also}) #0 {{",
        "entry:",
        f"  %sums = alloca [{groups * AMX_ROWS * how.width} x i32], align 64",
    ]
    for group in range(groups):
        lines += [
            f"  %x_off{group} = mul i64 %r{group}, %x_row",
            f"  %x{group} = getelementptr i8, ptr %x, i64 %x_off{group}",
            f"  %out_off{group} = mul i64 %r{group}, %out_row",
            f"  %out{group} = getelementptr i8, ptr %out, i64 %out_off{group}",
            f"  %x_scales{group} = getelementptr float, ptr %x_scales, i64 %r{group}",
            f"  %sums{group} = getelementptr i32, ptr %sums, i64 {group * AMX_ROWS * how.width}",
        ]
    for turn in range(how.vectors // columns):
        lines += _columns(how, groups, range(turn * columns, (turn + 1) * columns), ahead and turn == 0, direct)
    if not direct:
        lines += [
            f"  call void @finish(ptr %sums{group}, ptr %out{group}, i64 %out_row, ptr %zeros, ptr %scales, "
            f"ptr %x_scales{group}, i64 %rows)"
            for group in range(groups)
        ]
    return "\n".join([*lines, "  ret void", "}"])


def _columns(how: Instructions, groups: int, columns: range, ahead: bool, direct: bool) -> list[str]:
    """All words of some columns of the tile, and then the sums to %out, or else to %sums."""
    multiply = "tdpbusd" if how.arithmetic is Arithmetic.INTEGER else "tdpbf16ps"
    turn, pitch = columns.start, 4 * how.width
    of_matrix = range(_SUMS + groups, 8)
    pairs = [(group, column) for column in columns for group in range(groups)]
    sums = {pair: register for register, pair in enumerate(pairs)}
    lines = [f"  call void @llvm.x86.tilezero(i8 {register})" for register in sums.values()]
    lines += [
        f"  br label %loop{turn}",
        f"loop{turn}:",
        f"  %k{turn} = phi i64 [0, {'%entry' if turn == 0 else f'%written{turn - len(columns)}'}], "
        f"[%k_next{turn}, %loop{turn}]",
        f"  %w_off{turn} = mul i64 %k{turn}, {pitch}",
        f"  %w_k{turn} = getelementptr i8, ptr %w, i64 %w_off{turn}",
    ]
    if ahead:
        for line in range(0, AMX_WORDS * pitch, _LINE):
            lines += [
                f"  %ahead{line} = getelementptr i8, ptr %w_k{turn}, i64 {AMX_WORDS * pitch + line}",
                f"  call void @llvm.prefetch.p0(ptr %ahead{line}, i32 0, i32 3, i32 1)",
            ]
    for group in range(groups):
        lines += [
            f"  %x_k{group}_{turn} = getelementptr i32, ptr %x{group}, i64 %k{turn}",
            f"  call void @llvm.x86.tileloadd64(i8 {_SUMS + group}, ptr %x_k{group}_{turn}, i64 %x_row)",
        ]
    for column in columns:
        register = of_matrix[column % len(of_matrix)]
        lines += [
            f"  %w{column} = getelementptr i8, ptr %w_k{turn}, i64 {_ROW_BYTES * column}",
            f"  call void @llvm.x86.tileloadd64(i8 {register}, ptr %w{column}, i64 {pitch})",
        ]
        lines += [
            f"  call void @llvm.x86.{multiply}(i8 {sums[group, column]}, i8 {_SUMS + group}, i8 {register})"
            for group in range(groups)
        ]
    lines += [
        f"  %k_next{turn} = add i64 %k{turn}, {AMX_WORDS}",
        f"  %more{turn} = icmp ult i64 %k_next{turn}, %words",
        f"  br i1 %more{turn}, label %loop{turn}, label %write{turn}",
        f"write{turn}:",
    ]
    place, row = ("out", "%out_row") if direct else ("sums", str(pitch))
    for group, column in pairs:
        at = f"%to{group}_{column}"
        lines += [
            f"  {at} = getelementptr i8, ptr %{place}{group}, i64 {_ROW_BYTES * column}",
            f"  call void @llvm.x86.tilestored64(i8 {sums[group, column]}, ptr {at}, i64 {row})",
        ]
    return [*lines, f"  br label %written{turn}", f"written{turn}:"]


def _finish(how: Instructions, narrow: bool) -> str:
    """Sums of rows that lie together, one after another, to where they are wanted."""
    kind = "i32" if how.arithmetic is Arithmetic.INTEGER else "float"
    loads = "\n".join(
        f"  %at{v} = getelementptr i8, ptr %sums_r, i64 {4 * how.lanes * v}\n"
        f"  %n0_{v} = load <{how.lanes} x {kind}>, ptr %at{v}, align 64"
        for v in range(how.vectors)
    )
    lines = "\n".join(written(how, 1, narrow))
    return f"""
define internal void @finish(ptr %sums, ptr %out, i64 %out_row, ptr %zeros, ptr %scales, ptr %row_scales,
                             i64 %rows) #0 {{
entry:
  br label %row
row:
  %r = phi i64 [0, %entry], [%r_next, %row]
  %sums_off = mul i64 %r, {4 * how.width}
  %sums_r = getelementptr i8, ptr %sums, i64 %sums_off
  %out_off = mul i64 %r, %out_row
  %o0 = getelementptr i8, ptr %out, i64 %out_off
  %x_scales = getelementptr float, ptr %row_scales, i64 %r
{loads}
{lines}
  %r_next = add i64 %r, 1
  %more = icmp ult i64 %r_next, %rows
  br i1 %more, label %row, label %done
done:
  ret void
}}"""
