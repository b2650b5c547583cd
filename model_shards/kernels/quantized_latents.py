"""Rows of the latent cache in one byte an element, written and widened as compiled functions.

Shapes: T tokens, R kv_lora_rank, O qk_rope_head_dim, B blocks of the cache.

    row       [ scale_inv : float32 | k_pe : O bfloat16 | kv_c : R bytes ]      model_shards.latent_row
    widened   [ kv_c : R bfloat16 | k_pe : O bfloat16 ]                         as a cache of bfloat16 has it

What is written is what `model_shards.latent_codec.QuantizedCodec` encodes, bit for bit.
"""

import functools
from dataclasses import dataclass

from model_shards.kernels.builder import LANES, Builder, Kind, Value
from model_shards.kernels.machine_code import TeamFunction
from model_shards.kernels.rows import LATENTS_ARGUMENTS, normalise, rotate
from model_shards.latent_row import SCALE_BYTES
from model_shards.quantization import SMALLEST_SCALE, Quantization

# The digits of fp8 (e4m3fn), s eeee mmm, and those of float32 as latent_codec.widen_fp8 compares them.
_DIGITS_BELOW = 20  # those of a float32 that fp8 has not
_SIGN_AND_DIGITS = 0x87F00000
_EXPONENTS_APART = 127 - 7
_SMALLEST_NORMAL = 2.0**-6
# Of the numbers from here to twice as much two that follow each other are as far apart as two of fp8 below its smallest
# normal one: 2^-9.
_WHOLE_STEPS = 2.0**14


@dataclass(frozen=True)
class QuantizedRow:
    """How the latent of a token lies in a cache of a bfloat16 model."""

    rank: int  # R, a multiple of 16
    rope: int  # O, even
    quantization: Quantization

    @property
    def bytes(self) -> int:
        """Of a row, a multiple of 4."""
        return self.values_at + self.rank

    @property
    def values_at(self) -> int:
        """Bytes before kv_c."""
        return SCALE_BYTES + 2 * self.rope

    @property
    def widen_name(self) -> str:
        """What compiled functions that call `widen` know it by."""
        return f"widen_{self.quantization}_{self.rank}_{self.rope}"

    @property
    def widened_bytes(self) -> int:
        """Of a row of bfloat16."""
        return 2 * (self.rank + self.rope)


WIDEN_ARGUMENTS = (
    "tokens",  # T
    "block_size",
    "blocks",  # address of the int64 numbers of the blocks that the tokens lie in, one block after another
    "cache",  # address of one layer's first row
    "out",  # address of bfloat16 [T, R + O]
)


@functools.cache
def widen(row: QuantizedRow) -> TeamFunction:
    """Copies rows in bfloat16. Pieces are tokens."""
    build = Builder(WIDEN_ARGUMENTS)
    given = build.arguments
    with build.pieces(given["tokens"]) as token:
        block = build.int_at(build.at(given["blocks"], (build.ir.sdiv(token, given["block_size"]), 8)))
        slot = build.ir.add(build.ir.mul(block, given["block_size"]), build.ir.srem(token, given["block_size"]))
        source, out = build.at(given["cache"], (slot, row.bytes)), build.at(given["out"], (token, row.widened_bytes))
        scale = build.spread(build.float_at(source))
        values = build.ir.add(source, build.const(row.values_at))
        with build.loop(build.const(row.rank), step=LANES) as i:
            value = _load(build, build.ir.add(values, i), row.quantization)
            build.store(build.at(out, (i, 2)), build.ir.fmul(value, scale), Kind.BFLOAT16)
        k_pe = build.ir.add(source, build.const(SCALE_BYTES))
        build.copy(k_pe, build.ir.add(out, build.const(2 * row.rank)), build.const(2 * row.rope))
    return TeamFunction(build.finish())


@functools.cache
def latents(row: QuantizedRow) -> TeamFunction:
    """What `model_shards.kernels.rows.latents` writes, as such rows; of the same arguments. O is a multiple of 16."""
    build = Builder(LATENTS_ARGUMENTS)
    given = build.arguments
    normed = build.array(row.rank // 2)  # bfloat16, two in the room of a float32
    with build.pieces(build.int_at(given["rows"])) as token:
        x = build.at(given["x"], (token, given["x_row"]))
        out = build.at(given["cache"], (build.int_at(build.at(given["slots"], (token, 8))), row.bytes))
        normalise(build, x, Kind.FLOAT32, given["rank"], given["eps"], given["weight"], normed)
        _quantize(build, row, normed, out)
        rotary = build.at(given["rotary"], (token, 4 * row.rope))
        k_pe = build.ir.add(out, build.const(SCALE_BYTES))
        rotate(build, build.at(x, (given["rank"], 4)), rotary, given["rope"], k_pe)
    return TeamFunction(build.finish())


def _quantize(build: Builder, row: QuantizedRow, normed: Value, out: Value) -> None:
    """scale_inv and kv_c of one row of R bfloat16 at `normed`."""
    rank = build.const(row.rank)
    largest = build.variable(build.numbers(0.0))
    nothing = build.variable(build.numbers(0.0))  # but not a number if one of the row is not finite
    with build.loop(rank, step=LANES) as i:
        value = build.load(build.at(normed, (i, 2)), Kind.BFLOAT16)
        largest.set(build.larger(build.magnitude(value), largest.get()))
        nothing.set(build.fma(value, build.numbers(0.0), nothing.get()))
    peak = build.ir.fdiv(build.largest_lane(largest.get()), build.number(float(row.quantization.largest)))
    tiny = build.number(SMALLEST_SCALE)
    normal = build.ir.select(build.ir.fcmp_ordered("<", peak, tiny), tiny, peak)
    found = build.ir.fadd(normal, build.sum(nothing.get()))
    build.put_float(out, found)
    scale, values = build.spread(found), build.ir.add(out, build.const(row.values_at))
    with build.loop(rank, step=LANES) as i:
        value = build.ir.fdiv(build.load(build.at(normed, (i, 2)), Kind.BFLOAT16), scale)
        _store(build, build.ir.add(values, i), value, row.quantization)


def _load(build: Builder, address: Value, quantization: Quantization) -> Value:
    """Sixteen elements there as float32, exactly; of fp8 as `model_shards.latent_codec.widen_fp8`."""
    words = build.bytes_at(address)
    if quantization is Quantization.INT8:
        return build.whole_floats(words)
    digits = build.ir.and_(build.ir.shl(words, build.integers(_DIGITS_BELOW)), build.integers(_SIGN_AND_DIGITS))
    return build.ir.fmul(build.floats_of(digits), build.numbers(2.0**_EXPONENTS_APART))


def _store(build: Builder, address: Value, value: Value, quantization: Quantization) -> None:
    """Sixteen float32 no larger than the largest there is, to nearest, ties to even."""
    if quantization is Quantization.INT8:
        build.store_bytes(address, value, signed=True)
        return
    magnitude = build.magnitude(value)
    bits = build.bits_of(magnitude)
    # Half of what is cut off, less one where the digit before it is even: what is larger carries.
    odd = build.ir.and_(build.ir.lshr(bits, build.integers(_DIGITS_BELOW)), build.integers(1))
    half = build.ir.add(build.integers((1 << _DIGITS_BELOW - 1) - 1), odd)
    from_zero = build.ir.sub(bits, build.integers(_EXPONENTS_APART << 23))
    normal = build.ir.lshr(build.ir.add(from_zero, half), build.integers(_DIGITS_BELOW))
    # Below the smallest normal number the digits count steps, as those of a sum with a power of two do.
    steps = build.bits_of(build.ir.fadd(magnitude, build.numbers(_WHOLE_STEPS)))
    counted = build.ir.sub(steps, build.bits_of(build.numbers(_WHOLE_STEPS)))
    small = build.ir.fcmp_ordered("<", magnitude, build.numbers(_SMALLEST_NORMAL))
    digits = build.ir.select(small, counted, normal)
    sign = build.ir.and_(build.ir.lshr(build.bits_of(value), build.integers(24)), build.integers(0x80))
    build.put_bytes(address, build.ir.or_(digits, sign))
