"""AMX's registers in a function that a Builder builds: eight of 16 rows of 64 bytes (model_shards.kernels.amx_ir).

All rows of all of them are configured, once: who has fewer rows than that has room for as many.
"""

from llvmlite import ir

from model_shards.kernels.builder import Builder, Value

ROWS = 16
ROW_BYTES = 64

_NUMBER = ir.IntType(8)
_NOTHING = ir.VoidType()
# The palette, then bytes of a row of each register, then rows of each (Intel's manual, volume 1, 18.2).
_CONFIGURATION = (1, 0, *[0x0040004000400040] * 2, 0, 0, 0x1010101010101010, 0)


class Amx:
    """Inside one compiled function; `release` ends it."""

    def __init__(self, build: Builder) -> None:
        assert not build.multiplies_rows, "those configure the registers as they need them"
        self._build = build
        place = build.array(ROW_BYTES // 4)
        for index, value in enumerate(_CONFIGURATION):
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

    def release(self) -> None:
        """Gives the registers back."""
        self._build.call("llvm.x86.tilerelease", _NOTHING, ())


def _number(register: int) -> ir.Constant:
    return ir.Constant(_NUMBER, register)
