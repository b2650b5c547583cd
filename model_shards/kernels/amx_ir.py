"""The text of the product of some rows and one tile of a matrix with AMX, as model_shards.kernels.tile_ir.

AMX has eight registers of up to 16 rows of 64 bytes, which are told by number (Intel 64 and IA-32 Architectures
Software Developer's Manual, volume 1, chapter 18), here

    0..3    sums of 16 rows of x and 16 outputs, one for each column of a tile; they stay there for all words
    4       16 words of 16 rows of x
    5..7    16 words of 16 outputs as they lie: a word of all 16 a row

How many rows registers have is configured, by all of them at once, and only when it changes: more than 16 rows are
taken 16 by 16, the last of them again if need be. What is written twice is the same.
"""

from model_shards.kernels.instructions import AMX_ROWS, AMX_WORDS, Arithmetic, Instructions
from model_shards.kernels.tile_ir import ROWS_ARGUMENTS, TILE_ARGUMENTS, written

ROW_BYTES = 64  # of a register
_CONFIG_BYTES = 64
_LINE = 64  # bytes of the cache
_X = 4

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
    return [_DECLARATIONS, _configurations(), _tile(how, narrow, streams), _finish(how, narrow), _rows()]


def _configurations() -> str:
    """@configurations: one for each number of rows."""
    table = b"".join(configuration(rows) for rows in range(1, AMX_ROWS + 1))
    text = "".join(f"\\{byte:02x}" for byte in table)
    return f'@configurations = internal constant [{len(table)} x i8] c"{text}", align 64'


def configuration(rows: int) -> bytes:
    """For `rows` of x: the palette, then bytes of a row and rows of each register."""
    widths = ROW_BYTES.to_bytes(2, "little") * 8
    heights = bytes(rows if register <= _X else AMX_WORDS for register in range(8))
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
  br i1 %is_same, label %next, label %configure
configure:
  %before = sub i64 %rows, 1
  %config_off = mul i64 %before, {_CONFIG_BYTES}
  %config = getelementptr i8, ptr @configurations, i64 %config_off
  call void @llvm.x86.ldtilecfg(ptr %config)
  store i64 %rows, ptr %configured
  br label %next
next:
  %first = phi i64 [0, %check], [0, %configure], [%first_next, %next]
  %r = call i64 @llvm.umin.i64(i64 %first, i64 %last)
  %x_off = mul i64 %r, %x_row
  %x_r = getelementptr i8, ptr %x, i64 %x_off
  %out_off = mul i64 %r, %out_row
  %out_r = getelementptr i8, ptr %out, i64 %out_off
  %row_scales = getelementptr float, ptr %x_scales, i64 %r
  call void @tile(ptr %x_r, ptr %w, ptr %out_r, i64 %words, i64 %x_row, i64 %out_row, ptr %zeros, ptr %scales,
                  ptr %row_scales, i64 %rows)
  %first_next = add i64 %first, {AMX_ROWS}
  %more = icmp ult i64 %first_next, %count
  br i1 %more, label %next, label %done
done:
  ret void
}}"""


def _tile(how: Instructions, narrow: bool, streams: bool) -> str:
    """As many rows as are configured."""
    multiply = "tdpbusd" if how.arithmetic is Arithmetic.INTEGER else "tdpbf16ps"
    pitch = 4 * how.width
    zeros, steps, stores = [], [], []
    # Of the words after these: memory is asked for them while these are multiplied.
    for line in range(0, AMX_WORDS * pitch if streams else 0, _LINE):
        steps += [
            f"  %ahead{line} = getelementptr i8, ptr %w_k, i64 {AMX_WORDS * pitch + line}",
            f"  call void @llvm.prefetch.p0(ptr %ahead{line}, i32 0, i32 3, i32 1)",
        ]
    direct = how.arithmetic is not Arithmetic.INTEGER and not narrow
    place, row = ("%out", "%out_row") if direct else ("%sums", str(pitch))
    for column in range(how.vectors):
        matrix = _X + 1 + column % 3
        zeros.append(f"  call void @llvm.x86.tilezero(i8 {column})")
        steps += [
            f"  %w{column} = getelementptr i8, ptr %w_k, i64 {ROW_BYTES * column}",
            f"  call void @llvm.x86.tileloadd64(i8 {matrix}, ptr %w{column}, i64 {pitch})",
            f"  call void @llvm.x86.{multiply}(i8 {column}, i8 {_X}, i8 {matrix})",
        ]
        stores += [
            f"  %s{column} = getelementptr i8, ptr {place}, i64 {ROW_BYTES * column}",
            f"  call void @llvm.x86.tilestored64(i8 {column}, ptr %s{column}, i64 {row})",
        ]
    if not direct:
        stores.append(
            "  call void @finish(ptr %sums, ptr %out, i64 %out_row, ptr %zeros, ptr %scales, ptr %x_scales, i64 %rows)"
        )
    return "\n".join(
        [
            f"define internal void @tile({TILE_ARGUMENTS}, i64 %rows) #0 {{",
            "entry:",
            f"  %sums = alloca [{AMX_ROWS * how.width} x i32], align 64",
            *zeros,
            "  br label %loop",
            "loop:",
            "  %k = phi i64 [0, %entry], [%k_next, %loop]",
            "  %x_k = getelementptr i32, ptr %x, i64 %k",
            f"  %w_off = mul i64 %k, {pitch}",
            "  %w_k = getelementptr i8, ptr %w, i64 %w_off",
            f"  call void @llvm.x86.tileloadd64(i8 {_X}, ptr %x_k, i64 %x_row)",
            *steps,
            f"  %k_next = add i64 %k, {AMX_WORDS}",
            "  %more = icmp ult i64 %k_next, %words",
            "  br i1 %more, label %loop, label %write",
            "write:",
            *stores,
            "  ret void",
            "}",
        ]
    )


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
