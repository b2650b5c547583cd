"""A compiled function under construction: loops, and sixteen float32 at a time, of float32 or bfloat16 in memory.

    builder = Builder(("x", "out", "rows"))
    with builder.pieces(builder.int_at(builder.arguments["rows"])) as row:
        builder.store(..., builder.load(...), Kind.BFLOAT16)

Addresses are integers (i64), in bytes. Every kernel that is built here is of vectors of LANES elements, and rows are
whole numbers of them.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from enum import Enum
from typing import Any, TypeAlias

import torch
from llvmlite import ir

from model_shards.kernels.instructions import Instructions
from model_shards.kernels.machine_code import find_openmp
from model_shards.kernels.product_ir import rows_ir
from model_shards.kernels.tile_ir import DECLARATIONS

LANES = 16
LEAST = -3.0e38  # below every score

I1, I16, I32, I64, F32 = ir.IntType(1), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
_POINTER = ir.PointerType()
_FLOATS = ir.VectorType(F32, LANES)
_WORDS = ir.VectorType(I32, LANES)
_HALVES = ir.VectorType(I16, LANES)
_MANY_HALVES = ir.VectorType(I16, 2 * LANES)
_BYTES = ir.VectorType(ir.IntType(8), LANES)

# exp(x): 2^n times 2^f, n whole and |f| <= 1/2, by the Taylor polynomial of degree 6 (relative error 1e-7).
EXP_COEFFICIENTS = (1.0, 0.6931471805599453, 0.2402265069591007, 0.05550410866482158, 0.009618129107628477,
                     0.0013333558146428443, 0.0001540353039338161)  # fmt: skip
_EXP_LIMIT = 126.0  # of the power of two, either way: what lies beyond is as good as nothing, or as all

# Rounds to bfloat16, for which the library has no type.
_NARROW = f"""
define internal <{LANES} x i16> @narrow(<{LANES} x float> %value) alwaysinline {{
  %rounded = call <{LANES} x bfloat> @llvm.x86.avx512bf16.cvtneps2bf16.512(<{LANES} x float> %value)
  %halves = bitcast <{LANES} x bfloat> %rounded to <{LANES} x i16>
  ret <{LANES} x i16> %halves
}}"""


class Kind(Enum):
    """How an element lies in memory."""

    FLOAT32 = 4
    BFLOAT16 = 2

    @property
    def bytes(self) -> int:
        """Of an element."""
        return int(self.value)


Value: TypeAlias = Any  # ir.Value: the library has no types


class Builder:
    """Builds `void share(ptr arguments, i64 first, i64 step)` (model_shards.kernels.machine_code)."""

    def __init__(self, arguments: Sequence[str], instructions: Instructions | None = None) -> None:
        """`instructions`: of the products of tiles in it, if there are any."""
        self._instructions = instructions
        self.has_tiles = instructions is not None and instructions.amx  # AMX's registers, which are given back
        able = torch.cpu.get_capabilities()
        self._narrows = bool(able.get("avx512_bf16"))  # whether the CPU rounds to bfloat16, and
        self._scales = bool(able.get("avx512_f"))  # multiplies by powers of two, each in one instruction
        self._module = ir.Module()
        kind = ir.FunctionType(ir.VoidType(), (_POINTER, I64, I64))
        self._function = ir.Function(self._module, kind, "share")
        self._entry = self._function.append_basic_block("entry")
        body = self._function.append_basic_block("body")
        self.ir = ir.IRBuilder(body)
        given, self._first, self._step = self._function.args
        base = self.ir.ptrtoint(given, I64)
        self._places = {name: self.ir.add(base, self.const(8 * index)) for index, name in enumerate(arguments)}
        self.arguments: dict[str, Value] = {name: self.int_at(place) for name, place in self._places.items()}
        self._body = body
        self._configured = None if instructions is None else self.variable(self.const(0)).place

    def finish(self) -> str:
        """The module's text; nothing can be added afterwards."""
        if self.has_tiles:
            self.call("llvm.x86.tilerelease", ir.VoidType(), ())
        self.ir.ret_void()
        ir.IRBuilder(self._entry).branch(self._body)
        # The machine is chosen when it is compiled.
        lines = [line for line in str(self._module).splitlines() if not line.startswith("target ")]
        given = []
        if self._instructions is not None:
            given += rows_ir(self._instructions)
        elif self._narrows:
            given.append(DECLARATIONS)
        if self._narrows:
            given.append(_NARROW)
        text = "\n".join(given)
        # Nothing can be declared twice, or where it is defined.
        declared = re.compile(r'declare .*@"([^"]+)"')
        kept = [line for line in lines if not ((found := declared.match(line)) and f"@{found[1]}(" in text)]
        return "\n".join([text, *kept])

    # --- control ------------------------------------------------------------------------------------------------

    @contextmanager
    def loop(self, stop: Value, start: Value | int = 0, step: Value | int = 1) -> Iterator[Value]:
        """The counter start, start + step, ... below stop."""
        start, step = self._int(start), self._int(step)
        before = self.ir.block
        body, after = self._function.append_basic_block(), self._function.append_basic_block()
        self.ir.cbranch(self.ir.icmp_signed("<", start, stop), body, after)
        self.ir.position_at_end(body)
        counter = self.ir.phi(I64)
        counter.add_incoming(start, before)
        yield counter
        following = self.ir.add(counter, step)
        counter.add_incoming(following, self.ir.block)
        self.ir.cbranch(self.ir.icmp_signed("<", following, stop), body, after)
        self.ir.position_at_end(after)

    def argument_address(self, name: str) -> Value:
        """Where an argument lies, which the function may write."""
        return self._places[name]

    def pieces(self, count: Value) -> AbstractContextManager[Value]:
        """This thread's share of `count` pieces."""
        return self.loop(count, self._first, self._step)

    @property
    def team(self) -> Value:
        """Number of threads, an i64."""
        return self._step

    def barrier(self) -> None:
        """Until all threads of the team are here: each must come, as often as the others."""
        with self.ir.if_then(self.ir.icmp_signed(">", self._step, self.const(1))):
            # Without OpenMP there is no team, and no such function.
            if find_openmp() is not None:
                self.call("GOMP_barrier", ir.VoidType(), ())

    @contextmanager
    def only_first(self) -> Iterator[None]:
        """One thread of the team."""
        with self.ir.if_then(self.ir.icmp_signed("==", self._first, self.const(0))):
            yield

    def variable(self, initial: Value) -> "Variable":
        """A value that a loop changes."""
        with self.ir.goto_block(self._entry):
            place = self.ir.alloca(initial.type)
        variable = Variable(self.ir, place, initial.type)
        variable.set(initial)
        return variable

    def array(self, count: int) -> Value:
        """The address of so many float32 of this thread's own, for as long as it is in the function."""
        with self.ir.goto_block(self._entry):
            place = self.ir.alloca(ir.ArrayType(F32, count))
            place.align = 4 * LANES  # sixteen of them in a line of the cache
            return self.ir.ptrtoint(place, I64)

    # --- integers and addresses ---------------------------------------------------------------------------------

    @staticmethod
    def const(value: int) -> ir.Constant:
        """An i64."""
        return ir.Constant(I64, value)

    def at(self, base: Value, *terms: tuple[Value, Value | int]) -> Value:
        """base + index * bytes + ..."""
        address = base
        for index, size in terms:
            address = self.ir.add(address, self.ir.mul(index, self._int(size)))
        return address

    def int_at(self, address: Value) -> Value:
        """The i64 there."""
        return self.ir.load(self.pointer(address), typ=I64, align=8)

    def put_int(self, address: Value, value: Value) -> None:
        """Writes an i64."""
        self.ir.store(value, self.pointer(address), align=8)

    def short_int_at(self, address: Value) -> Value:
        """The i32 there, as an i64."""
        return self.ir.sext(self.ir.load(self.pointer(address), typ=I32, align=4), I64)

    def put_short_int(self, address: Value, value: Value) -> None:
        """Writes the lower half of an i64."""
        self.ir.store(self.ir.trunc(value, I32), self.pointer(address), align=4)

    def smaller(self, a: Value, b: Value) -> Value:
        """Of two i64."""
        return self.ir.select(self.ir.icmp_signed("<", a, b), a, b)

    def larger_int(self, a: Value, b: Value) -> Value:
        """Of two i64."""
        return self.ir.select(self.ir.icmp_signed(">", a, b), a, b)

    def copy(self, source: Value, target: Value, num_bytes: Value) -> None:
        """Between places that do not overlap."""
        self.call(
            "llvm.memcpy.p0.p0.i64",
            ir.VoidType(),
            (self.pointer(target), self.pointer(source), num_bytes, ir.Constant(I1, 0)),
        )

    def _int(self, value: Value | int) -> Value:
        return self.const(value) if isinstance(value, int) else value

    def pointer(self, address: Value) -> Value:
        """As calls of the library take it."""
        return self.ir.inttoptr(address, _POINTER)

    # --- products -----------------------------------------------------------------------------------------------

    def tile_rows(
        self, count: Value, x: Value, x_row: Value, tile: Value, words: Value, out: Value, out_row: Value
    ) -> None:
        """`count` rows of bfloat16 times one laid-out tile (model_shards.kernels.product_ir), into rows of float32."""
        assert self._configured is not None, "instructions are said at the start"
        nothing = ir.Constant(_POINTER, None)
        places = [self.pointer(address) for address in (x, tile, out)]
        scaling = (nothing, nothing, nothing)
        self.call("rows", ir.VoidType(), (count, *places, words, x_row, out_row, *scaling, self._configured))

    def words(self, first: Value, second: Value) -> Value:
        """Sixteen words of two bfloat16 each: a lane of `first`, and one of `second`."""
        low, high = (self.ir.zext(self._rounded(value), _WORDS) for value in (first, second))
        return self.ir.or_(low, self.ir.shl(high, self.integers(16)))

    def halves_at(self, address: Value) -> Value:
        """Thirty-two bfloat16 as they lie."""
        return self.ir.load(self.pointer(address), typ=_MANY_HALVES, align=2)

    def interleaved(self, first: Value, second: Value) -> list[Value]:
        """Twice sixteen words: an element of `first`, and one of `second`."""
        numbers = [half for pair in zip(range(2 * LANES), range(2 * LANES, 4 * LANES), strict=True) for half in pair]
        words = []
        for part in (numbers[: 2 * LANES], numbers[2 * LANES :]):
            places = ir.Constant(ir.VectorType(I32, 2 * LANES), part)
            words.append(self.ir.bitcast(self.ir.shuffle_vector(first, second, places), _WORDS))
        return words

    def words_at(self, address: Value) -> Value:
        """Sixteen words as they lie."""
        return self.ir.load(self.pointer(address), typ=_WORDS, align=4)

    def no_words(self) -> ir.Constant:
        """Sixteen times zero."""
        return ir.Constant(_WORDS, [0] * LANES)

    def no_halves(self) -> ir.Constant:
        """Thirty-two times zero."""
        return ir.Constant(_MANY_HALVES, [0] * 2 * LANES)

    def put_words(self, address: Value, words: Value) -> None:
        """Writes sixteen of them."""
        self.ir.store(words, self.pointer(address), align=4)

    def transposed(self, rows: Sequence[Value]) -> list[Value]:
        """Sixteen rows of sixteen words to as many columns: halves, quarters, ... change places."""
        rows = list(rows)
        for width in (8, 4, 2, 1):
            upper = [lane if not lane & width else LANES + (lane ^ width) for lane in range(LANES)]
            lower = [lane | width if not lane & width else LANES + lane for lane in range(LANES)]
            for first in (row for row in range(LANES) if not row & width):
                pair = rows[first], rows[first | width]
                for place, lanes in ((first, upper), (first | width, lower)):
                    rows[place] = self.ir.shuffle_vector(*pair, ir.Constant(_WORDS, lanes))
        return rows

    # --- one float ----------------------------------------------------------------------------------------------

    @staticmethod
    def number(value: float) -> ir.Constant:
        """A float32."""
        return ir.Constant(F32, value)

    def float_at(self, address: Value) -> Value:
        """The float32 there."""
        return self.ir.load(self.pointer(address), typ=F32, align=4)

    def put_float(self, address: Value, value: Value) -> None:
        """Writes a float32."""
        self.ir.store(value, self.pointer(address), align=4)

    def float_of(self, bits: Value) -> Value:
        """The float32 in the lower half of an i64."""
        return self.ir.bitcast(self.ir.trunc(bits, I32), F32)

    def square_root(self, value: Value) -> Value:
        """Of a float32."""
        return self.call("llvm.sqrt.f32", F32, (value,))

    # --- sixteen floats -----------------------------------------------------------------------------------------

    def spread(self, scalar: Value) -> Value:
        """A float32 in every lane."""
        vector = self.ir.insert_element(ir.Constant(_FLOATS, ir.Undefined), scalar, ir.Constant(I32, 0))
        return self.ir.shuffle_vector(vector, ir.Constant(_FLOATS, ir.Undefined), ir.Constant(_WORDS, [0] * LANES))

    def numbers(self, value: float) -> ir.Constant:
        """A constant in every lane."""
        return ir.Constant(_FLOATS, [ir.Constant(F32, value)] * LANES)

    def integers(self, value: int) -> ir.Constant:
        """A constant of 32 bits in every lane."""
        return ir.Constant(_WORDS, [ir.Constant(I32, value)] * LANES)

    def alternating(self) -> ir.Constant:
        """-1, 1, -1, 1, ..."""
        return ir.Constant(_FLOATS, [ir.Constant(F32, 2.0 * (lane % 2) - 1.0) for lane in range(LANES)])

    def load(self, address: Value, kind: Kind) -> Value:
        """Sixteen elements, as float32."""
        if kind is Kind.FLOAT32:
            return self.ir.load(self.pointer(address), typ=_FLOATS, align=4)
        halves = self.ir.load(self.pointer(address), typ=_HALVES, align=2)
        return self.ir.bitcast(self.ir.shl(self.ir.zext(halves, _WORDS), self.integers(16)), _FLOATS)

    def store(self, address: Value, value: Value, kind: Kind) -> None:
        """Sixteen elements, rounded to nearest, ties to even; what is not a number stays none."""
        if kind is Kind.FLOAT32:
            self.ir.store(value, self.pointer(address), align=4)
        else:
            self.ir.store(self._rounded(value), self.pointer(address), align=2)

    def store_bytes(self, address: Value, value: Value, signed: bool = False) -> None:
        """Sixteen uint8 or int8, to nearest, ties to even, no more and no less than there are; not a number: 0."""
        whole = self.call(f"llvm.rint.v{LANES}f32", _FLOATS, (value,))
        narrow = self.call(f"llvm.fpto{'s' if signed else 'u'}i.sat.v{LANES}i8.v{LANES}f32", _BYTES, (whole,))
        self.ir.store(narrow, self.pointer(address), align=1)

    def bytes_at(self, address: Value) -> Value:
        """Sixteen int8 there, as 32 bits each."""
        return self.ir.sext(self.ir.load(self.pointer(address), typ=_BYTES, align=1), _WORDS)

    def put_bytes(self, address: Value, words: Value) -> None:
        """Writes the lowest eight bits of each of sixteen words."""
        self.ir.store(self.ir.trunc(words, _BYTES), self.pointer(address), align=1)

    def whole_floats(self, words: Value) -> Value:
        """The numbers of 32 bits, as float32."""
        return self.ir.sitofp(words, _FLOATS)

    def floats_of(self, bits: Value) -> Value:
        """The float32 of these digits."""
        return self.ir.bitcast(bits, _FLOATS)

    def bits_of(self, floats: Value) -> Value:
        """Their digits."""
        return self.ir.bitcast(floats, _WORDS)

    def magnitude(self, value: Value) -> Value:
        """|x| of each lane."""
        return self.call(f"llvm.fabs.v{LANES}f32", _FLOATS, (value,))

    def _rounded(self, value: Value) -> Value:
        """bfloat16 in i16."""
        build = self.ir
        if self._narrows:
            return self.call("narrow", _HALVES, (value,))
        bits = build.bitcast(value, _WORDS)
        odd = build.and_(build.lshr(bits, self.integers(16)), self.integers(1))
        nearest = build.add(bits, build.add(odd, self.integers(0x7FFF)))
        quiet = build.or_(bits, self.integers(0x400000))  # adding could carry one that is not a number into the sign
        chosen = build.select(build.fcmp_unordered("uno", value, value), quiet, nearest)
        return build.trunc(build.lshr(chosen, self.integers(16)), _HALVES)

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        """a * b + c, rounded once."""
        return self.call(f"llvm.fma.v{LANES}f32", _FLOATS, (a, b, c))

    def exp(self, x: Value) -> Value:
        """e^x of each lane, of any size: between 2^-126 and 2^126. What is not a number stays none."""
        build = self.ir
        power = build.fmul(x, self.numbers(1.4426950408889634))
        for limit, beyond in ((-_EXP_LIMIT, "<"), (_EXP_LIMIT, ">")):
            power = build.select(build.fcmp_ordered(beyond, power, self.numbers(limit)), self.numbers(limit), power)
        whole = self.call(f"llvm.rint.v{LANES}f32", _FLOATS, (power,))
        part = build.fsub(power, whole)
        value: Value = self.numbers(EXP_COEFFICIENTS[-1])
        for coefficient in reversed(EXP_COEFFICIENTS[:-1]):
            value = self.fma(value, part, self.numbers(coefficient))
        return self._times_power_of_two(value, whole)

    def _times_power_of_two(self, value: Value, power: Value) -> Value:
        """value * 2^power; powers are whole, and within the limits of exponents."""
        build = self.ir
        if self._scales:
            every = ir.Constant(I16, -1)
            as_set = ir.Constant(I32, 4)  # rounding
            name = "llvm.x86.avx512.mask.scalef.ps.512"
            return self.call(name, _FLOATS, (value, power, value, every, as_set))
        shifted = self.call(f"llvm.fptosi.sat.v{LANES}i32.v{LANES}f32", _WORDS, (power,))
        exponent = build.bitcast(build.shl(build.add(shifted, self.integers(127)), self.integers(23)), _FLOATS)
        return build.fmul(value, exponent)

    def first_lanes(self, count: Value, vector: Value, other: Value) -> Value:
        """Of `vector` the first `count` lanes, any i64, and of `other` the rest."""
        lanes = ir.Constant(_WORDS, [ir.Constant(I32, lane) for lane in range(LANES)])
        clamped = self.ir.trunc(self.smaller(count, self.const(LANES)), I32)
        undefined = ir.Constant(_WORDS, ir.Undefined)
        counts = self.ir.insert_element(undefined, clamped, ir.Constant(I32, 0))
        counts = self.ir.shuffle_vector(counts, undefined, ir.Constant(_WORDS, [0] * LANES))
        return self.ir.select(self.ir.icmp_signed("<", lanes, counts), vector, other)

    def larger(self, a: Value, b: Value) -> Value:
        """Lane by lane."""
        return self.ir.select(self.ir.fcmp_ordered(">", a, b), a, b)

    def lane(self, vector: Value, lane: int) -> Value:
        """One of its elements."""
        return self.ir.extract_element(vector, ir.Constant(I32, lane))

    def sum(self, vector: Value) -> Value:
        """Of the lanes, by halves."""
        return self._by_halves(vector, self.ir.fadd)

    def largest_lane(self, vector: Value) -> Value:
        """Of the lanes."""
        return self._by_halves(vector, self.larger)

    def _by_halves(self, vector: Value, join: Callable[[Value, Value], Value]) -> Value:
        width = LANES // 2
        while width:
            vector = join(vector, self.shuffled(vector, [(lane + width) % LANES for lane in range(LANES)]))
            width //= 2
        return self.ir.extract_element(vector, ir.Constant(I32, 0))

    def shuffled(self, vector: Value, lanes: Sequence[int]) -> Value:
        """Lane i of the result is lane lanes[i]."""
        return self.ir.shuffle_vector(vector, vector, ir.Constant(_WORDS, [ir.Constant(I32, lane) for lane in lanes]))

    def run(self, name: str, arguments: Sequence[str], values: Mapping[str, Value]) -> None:
        """All pieces of another compiled function, which the module is told where to find, on this thread."""
        told = self.array(2 * len(arguments))
        for index, argument in enumerate(arguments):
            self.put_int(self.at(told, (self.const(index), 8)), values[argument])
        self.call(name, ir.VoidType(), (self.pointer(told), self.const(0), self.const(1)))

    def call(self, name: str, result: ir.Type, values: Sequence[Value]) -> Value:
        """An intrinsic of LLVM, or a function that the module is given."""
        known = self._module.globals.get(name)
        if known is None:
            known = ir.Function(self._module, ir.FunctionType(result, [value.type for value in values]), name)
        return self.ir.call(known, values)


class Variable:
    """A value in a place of its own, which the compiler turns into a register."""

    def __init__(self, builder: ir.IRBuilder, place: Value, kind: ir.Type) -> None:
        self._ir = builder
        self.place = place
        self._kind = kind

    def get(self) -> Value:
        """As of here."""
        return self._ir.load(self.place, typ=self._kind)

    def set(self, value: Value) -> None:
        """From here on."""
        self._ir.store(value, self.place)
