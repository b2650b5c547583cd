"""What lies between the products of a layer, row by row: norms, rotations, SwiGLU's gate.

Shapes: T rows, H elements of a row, N heads, P qk_nope_head_dim, O qk_rope_head_dim, R kv_lora_rank.

Each is float32 within, and rounds once where it writes bfloat16. `rows` is the address of T: it changes from step to
step where the arguments do not. Pieces of the work are rows.
"""

import functools

from model_shards.kernels.builder import LANES, Builder, Kind, Value
from model_shards.kernels.machine_code import TeamFunction
from model_shards.quantization import SMALLEST_SCALE, ZERO_POINT, Quantization

NORM_ARGUMENTS = (
    "rows",
    "x",  # address of float32 [T, ...]
    "x_row",  # bytes from row to row
    "weight",  # address of bfloat16 [H]
    "eps",  # float32, as the lower four bytes
    "out",  # address of bfloat16 [T, H]
    "size",  # H
)


@functools.cache
def norm() -> TeamFunction:
    """out = x / rms(x) * weight."""
    build = Builder(NORM_ARGUMENTS)
    given = build.arguments
    with build.pieces(build.int_at(given["rows"])) as row:
        x = build.at(given["x"], (row, given["x_row"]))
        out = build.at(given["out"], (row, build.ir.mul(given["size"], build.const(2))))
        normalise(build, x, Kind.FLOAT32, given["size"], given["eps"], given["weight"], out)
    return TeamFunction(build.finish())


RESIDUAL_ARGUMENTS = (
    "rows",
    "residual",  # address of bfloat16 [T, H], which the addends are added to
    "float_addend",  # address of float32 [T, ...], of whose rows the first H are read
    "float_row",  # bytes from row to row of it
    "bfloat_addend",  # address of bfloat16 [T, H]
    "weight",  # address of bfloat16 [H]
    "eps",  # float32, as the lower four bytes
    "out",  # address of bfloat16 [T, H]
    "size",  # H
)


@functools.cache
def residual_norm(addends: tuple[Kind, ...]) -> TeamFunction:
    """residual += addends; out = residual / rms(residual) * weight, of the sum as it is kept.

    `addends`: none, or one of a kind. An address that is not read may be anything.
    """
    build = Builder(RESIDUAL_ARGUMENTS)
    given = build.arguments
    size = given["size"]
    with build.pieces(build.int_at(given["rows"])) as row:
        residual = build.at(given["residual"], (row, build.ir.mul(size, build.const(2))))
        out = build.at(given["out"], (row, build.ir.mul(size, build.const(2))))
        if addends:
            places = {
                Kind.FLOAT32: build.at(given["float_addend"], (row, given["float_row"])),
                Kind.BFLOAT16: build.at(given["bfloat_addend"], (row, build.ir.mul(size, build.const(2)))),
            }
            starts = {kind: places[kind] for kind in addends}
            with build.loop(size, step=LANES) as i:
                place = build.at(residual, (i, 2))
                total = build.load(place, Kind.BFLOAT16)
                for kind, start in starts.items():
                    total = build.ir.fadd(total, build.load(build.at(start, (i, kind.bytes)), kind))
                build.store(place, total, Kind.BFLOAT16)
        normalise(build, residual, Kind.BFLOAT16, size, given["eps"], given["weight"], out)
    return TeamFunction(build.finish())


LATENTS_ARGUMENTS = (
    "rows",
    "x",  # address of float32 [T, ...], of whose rows the first R + O are read
    "x_row",  # bytes from row to row
    "weight",  # address of bfloat16 [R]
    "eps",  # float32, as the lower four bytes
    "rotary",  # address of complex64 [T, O / 2]
    "slots",  # address of int64 [T]
    "cache",  # address of bfloat16 [..., R + O]
    "rank",  # R
    "rope",  # O
)


@functools.cache
def latents() -> TeamFunction:
    """Writes the norm of the first R elements, and the next O rotated, into each token's slot of a cache."""
    build = Builder(LATENTS_ARGUMENTS)
    given = build.arguments
    width = build.ir.add(given["rank"], given["rope"])
    with build.pieces(build.int_at(given["rows"])) as row:
        x = build.at(given["x"], (row, given["x_row"]))
        slot = build.int_at(build.at(given["slots"], (row, 8)))
        out = build.at(given["cache"], (slot, build.ir.mul(width, build.const(2))))
        normalise(build, x, Kind.FLOAT32, given["rank"], given["eps"], given["weight"], out)
        rotary = build.at(given["rotary"], (row, build.ir.mul(given["rope"], build.const(4))))
        rotate(build, build.at(x, (given["rank"], 4)), rotary, given["rope"], build.at(out, (given["rank"], 2)))
    return TeamFunction(build.finish())


QUERIES_ARGUMENTS = (
    "rows",
    "x",  # address of float32 [T, N * (P + O), ...]
    "x_row",  # bytes from row to row
    "rotary",  # address of complex64 [T, O / 2]
    "out",  # address of bfloat16 [T, N, P + O]
    "heads",  # N
    "nope",  # P
    "rope",  # O
)


@functools.cache
def queries() -> TeamFunction:
    """out = x with the last O elements of each head rotated."""
    build = Builder(QUERIES_ARGUMENTS)
    given = build.arguments
    head_size = build.ir.add(given["nope"], given["rope"])
    row_size = build.ir.mul(given["heads"], head_size)
    with build.pieces(build.int_at(given["rows"])) as row:
        rotary = build.at(given["rotary"], (row, build.ir.mul(given["rope"], build.const(4))))
        with build.loop(given["heads"]) as head:
            first = build.ir.mul(head, head_size)
            x = build.at(given["x"], (row, given["x_row"]), (first, 4))
            out = build.at(given["out"], (build.ir.add(build.ir.mul(row, row_size), first), 2))
            with build.loop(given["nope"], step=LANES) as i:
                build.store(build.at(out, (i, 2)), build.load(build.at(x, (i, 4)), Kind.FLOAT32), Kind.BFLOAT16)
            rotate(build, build.at(x, (given["nope"], 4)), rotary, given["rope"], build.at(out, (given["nope"], 2)))
    return TeamFunction(build.finish())


SWIGLU_ARGUMENTS = (
    "rows",
    "x",  # address of float32 [T, ...], of whose rows the first 2 * size are read, and overwritten when quantized
    "x_row",  # bytes from row to row
    "out",  # address of [T, size]: bfloat16, or uint8 when quantized
    "scales",  # address of float32 [T]; quantized only
    "size",
)


@functools.cache
def swiglu(quantized: bool = False) -> TeamFunction:
    """out = silu(first half of x) * second half; quantized as model_shards.packing does."""
    build = Builder(SWIGLU_ARGUMENTS)
    given = build.arguments
    size = given["size"]
    with build.pieces(build.int_at(given["rows"])) as row:
        gate = build.at(given["x"], (row, given["x_row"]))
        up = build.at(gate, (size, 4))
        out = build.at(given["out"], (row, build.ir.mul(size, build.const(1 if quantized else 2))))
        with build.loop(size, step=LANES) as i:
            x = build.load(build.at(gate, (i, 4)), Kind.FLOAT32)
            below = build.ir.fadd(build.numbers(1.0), build.exp(build.ir.fneg(x)))
            value = build.ir.fmul(build.ir.fdiv(x, below), build.load(build.at(up, (i, 4)), Kind.FLOAT32))
            if quantized:
                build.store(build.at(gate, (i, 4)), value, Kind.FLOAT32)
            else:
                build.store(build.at(out, (i, 2)), value, Kind.BFLOAT16)
        if quantized:
            quantize_row(build, gate, Kind.FLOAT32, size, out, build.at(given["scales"], (row, 4)))
    return TeamFunction(build.finish())


QUANTIZE_ARGUMENTS = (
    "rows",
    "x",  # address of bfloat16 [T, size]
    "out",  # address of uint8 [T, size]
    "scales",  # address of float32 [T]
    "size",
)


@functools.cache
def quantize() -> TeamFunction:
    """Each row of x in 8 bits, and its scale."""
    build = Builder(QUANTIZE_ARGUMENTS)
    given = build.arguments
    size = given["size"]
    with build.pieces(build.int_at(given["rows"])) as row:
        x = build.at(given["x"], (row, build.ir.mul(size, build.const(2))))
        out = build.at(given["out"], (row, size))
        quantize_row(build, x, Kind.BFLOAT16, size, out, build.at(given["scales"], (row, 4)))
    return TeamFunction(build.finish())


def quantize_row(build: Builder, x: Value, kind: Kind, size: Value, out: Value, scale: Value) -> None:
    """One row of `size` elements at x into uint8 at out, and its scale: see model_shards.packing."""
    largest = build.variable(build.numbers(0.0))
    nothing = build.variable(build.numbers(0.0))  # but not a number if one of the row is not finite
    with build.loop(size, step=LANES) as i:
        value = build.load(build.at(x, (i, kind.bytes)), kind)
        largest.set(build.larger(build.magnitude(value), largest.get()))
        nothing.set(build.fma(value, build.numbers(0.0), nothing.get()))
    peak = build.ir.fdiv(build.largest_lane(largest.get()), build.number(float(Quantization.INT8.largest)))
    tiny = build.number(SMALLEST_SCALE)
    normal = build.ir.select(build.ir.fcmp_ordered("<", peak, tiny), tiny, peak)
    found = build.ir.fadd(normal, build.sum(nothing.get()))
    build.put_float(scale, found)
    inverse = build.spread(build.ir.fdiv(build.number(1.0), found))
    with build.loop(size, step=LANES) as i:
        value = build.load(build.at(x, (i, kind.bytes)), kind)
        build.store_bytes(build.at(out, (i, 1)), build.fma(value, inverse, build.numbers(float(ZERO_POINT))))


def normalise(build: Builder, x: Value, kind: Kind, size: Value, eps: Value, weight: Value, out: Value) -> None:
    """One row of `size` elements at x, into bfloat16 at out."""
    squares = build.variable(build.numbers(0.0))
    with build.loop(size, step=LANES) as i:
        value = build.load(build.at(x, (i, kind.bytes)), kind)
        squares.set(build.fma(value, value, squares.get()))
    mean = build.ir.fdiv(build.sum(squares.get()), build.ir.sitofp(size, build.number(0.0).type))
    root = build.square_root(build.ir.fadd(mean, build.float_of(eps)))
    scale = build.spread(build.ir.fdiv(build.number(1.0), root))
    with build.loop(size, step=LANES) as i:
        value = build.ir.fmul(build.load(build.at(x, (i, kind.bytes)), kind), scale)
        scaled = build.ir.fmul(value, build.load(build.at(weight, (i, 2)), Kind.BFLOAT16))
        build.store(build.at(out, (i, 2)), scaled, Kind.BFLOAT16)


def rotate(build: Builder, x: Value, rotary: Value, size: Value, out: Value) -> None:
    """`size` float32 at x, in pairs, each times its complex64 at rotary, into bfloat16 at out."""
    with build.loop(size, step=LANES) as i:
        turned = _turned(build, build.at(x, (i, 4)), build.at(rotary, (i, 4)))
        build.store(build.at(out, (i, 2)), turned, Kind.BFLOAT16)


def _turned(build: Builder, x: Value, rotary: Value) -> Value:
    """Eight pairs (2i, 2i + 1) at x, each times the complex number at rotary."""
    pairs = build.load(x, Kind.FLOAT32)
    turn = build.load(rotary, Kind.FLOAT32)
    cosines = build.shuffled(turn, [lane - lane % 2 for lane in range(LANES)])
    sines = build.shuffled(turn, [lane - lane % 2 + 1 for lane in range(LANES)])
    swapped = build.shuffled(pairs, [lane ^ 1 for lane in range(LANES)])
    across = build.ir.fmul(swapped, sines)
    return build.fma(pairs, cosines, build.ir.fmul(across, build.alternating()))
