"""AMX's registers in a function that a Builder builds: eight of 16 rows of 64 bytes (model_shards.kernels.amx_ir).

All rows of all of them are configured, once: who has fewer rows than that has room for as many.
"""

import struct

from llvmlite import ir

from model_shards.kernels.amx_ir import configuration
from model_shards.kernels.builder import Builder, Value
from model_shards.kernels.instructions import AMX_ROWS

_NUMBER = ir.IntType(8)
_NOTHING = ir.VoidType()


class Amx:
    """Inside one compiled function; the Builder gives the registers back at its end."""

    def __init__(self, build: Builder) -> None:
        assert not build.has_tiles, "whoever multiplies rows configures the registers as it needs them"
        build.has_tiles = True
        self._build = build
        numbers = struct.unpack("<8q", configuration(AMX_ROWS))
        place = build.array(2 * len(numbers))
        for index, value in enumerate(numbers):
            build.put_int(build.at(place, (build.const(index), 8)), build.const(value))
        build.call("llvm.x86.ldtilecfg", _NOTHING, (build.pointer(place),))

    def zero(self, register: int) -> None:
        """Of every element."""
        self._build.call("llvm.x86.tilezero", _NOTHING, (_number(register),))

    def load(self, register: int, address: Value, row: Value) -> None:
        """Rows that lie `row` bytes apart."""
        place = self._build.pointer(address)
        self._build.call("llvm.x86.tileloadd64", _NOTHING, (_number(register), place, row))

    def store(self, register: int, address: Value, row: Value) -> None:
        """To rows that lie `row` bytes apart."""
        place = self._build.pointer(address)
        self._build.call("llvm.x86.tilestored64", _NOTHING, (_number(register), place, row))

    def multiply(self, sums: int, x: int, matrix: int) -> None:
        """sums += x matrix: 16 words of 16 rows of x, and of the matrix a word of 16 outputs a row; of bfloat16."""
        registers = (_number(sums), _number(x), _number(matrix))
        self._build.call("llvm.x86.tdpbf16ps", _NOTHING, registers)


def _number(register: int) -> ir.Constant:
    return ir.Constant(_NUMBER, register)
