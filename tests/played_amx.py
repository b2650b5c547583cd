"""AMX's registers played by memory, for CPUs that have none: `model_shards.kernels.amx.Amx` in slow vector code."""

from model_shards.kernels.amx_ir import ROW_BYTES
from model_shards.kernels.builder import Builder, Kind, Value
from model_shards.kernels.instructions import AMX_ROWS, AMX_WORDS


class PlayedAmx:
    """Eight registers of 16 rows of 64 bytes, of each thread."""

    def __init__(self, build: Builder) -> None:
        self._build = build
        self._registers = [build.array(AMX_ROWS * ROW_BYTES // 4) for _ in range(8)]

    def zero(self, register: int) -> None:
        """Of every element."""
        build = self._build
        with build.loop(build.const(AMX_ROWS)) as row:
            build.put_words(self._row(register, row), build.no_words())

    def load(self, register: int, address: Value, row: Value) -> None:
        """Rows that lie `row` bytes apart."""
        build = self._build
        with build.loop(build.const(AMX_ROWS)) as i:
            build.put_words(self._row(register, i), build.words_at(build.at(address, (i, row))))

    def store(self, register: int, address: Value, row: Value) -> None:
        """To rows that lie `row` bytes apart."""
        build = self._build
        with build.loop(build.const(AMX_ROWS)) as i:
            build.put_words(build.at(address, (i, row)), build.words_at(self._row(register, i)))

    def multiply(self, sums: int, x: int, matrix: int) -> None:
        """sums += x matrix: 16 words of 16 rows of x, and of the matrix a word of 16 outputs a row; of bfloat16."""
        build = self._build
        with build.loop(build.const(AMX_ROWS)) as row:
            total = build.variable(build.load(self._row(sums, row), Kind.FLOAT32))
            with build.loop(build.const(AMX_WORDS)) as word:
                one = build.bits_of(build.spread(build.float_at(build.at(self._row(x, row), (word, 4)))))
                other = build.words_at(self._row(matrix, word))
                for half in (self._low, self._high):
                    total.set(build.fma(half(one), half(other), total.get()))
            build.store(self._row(sums, row), total.get(), Kind.FLOAT32)

    def _row(self, register: int, row: Value) -> Value:
        return self._build.at(self._registers[register], (row, ROW_BYTES))

    def _low(self, words: Value) -> Value:
        return self._build.floats_of(self._build.ir.shl(words, self._build.integers(16)))

    def _high(self, words: Value) -> Value:
        return self._build.floats_of(self._build.ir.and_(words, self._build.integers(0xFFFF0000)))
