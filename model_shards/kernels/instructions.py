"""What a CPU multiplies with, and the LLVM instructions of one step of a product.

A *word* is what one 32-bit lane of a register holds of a weight's row: 2 bfloat16 or 4 int8, of neighbouring inputs.
One step takes the words of `width` outputs, one a lane, and the same inputs of a row x, and adds their products lane by
lane:

    dot      bfloat16 x bfloat16, summed in float32                       AVX512_BF16
    widen    a bfloat16 is the upper half of a float32: x of float32      AVX2 or AVX-512, with FMA
    integer  uint8 x int8, summed in int32                                AVX512_VNNI or AVX_VNNI

AMX does dot and integer for 16 words of 16 outputs and 16 rows at once (model_shards.kernels.amx_ir).
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum

import torch

AMX_ROWS = 16  # of x
AMX_WORDS = 16
_VECTOR_ROWS = 6


class Arithmetic(Enum):
    """How a word is multiplied."""

    DOT = "dot"
    WIDEN = "widen"
    INTEGER = "integer"


@dataclass(frozen=True)
class Instructions:
    """One way to multiply, with the tile that fills the registers of a CPU that has it."""

    arithmetic: Arithmetic
    lanes: int  # 32-bit lanes of a register
    vectors: int  # registers of weights in a tile
    rows: int  # most rows of x in a tile: each has its own sums in `vectors` registers
    amx: bool = False

    def for_words(self, words: int) -> "Instructions":
        """These, or if AMX cannot take so many words, those of vectors that read the same layout."""
        return self if not self.amx or words % AMX_WORDS == 0 else replace(self, rows=_VECTOR_ROWS, amx=False)

    @property
    def width(self) -> int:
        """Outputs of a tile."""
        return self.lanes * self.vectors

    @property
    def weight_dtype(self) -> torch.dtype:
        """Of the matrix."""
        return torch.int8 if self.arithmetic is Arithmetic.INTEGER else torch.bfloat16

    @property
    def operand_dtype(self) -> torch.dtype:
        """Of x."""
        return {
            Arithmetic.DOT: torch.bfloat16,
            Arithmetic.WIDEN: torch.float32,
            Arithmetic.INTEGER: torch.uint8,
        }[self.arithmetic]

    @property
    def word_inputs(self) -> int:
        """Inputs of a word."""
        return 4 // self.weight_dtype.itemsize

    @property
    def word_operand_bytes(self) -> int:
        """Bytes of x that meet a word."""
        return self.word_inputs * self.operand_dtype.itemsize


def choose_instructions(dtype: torch.dtype) -> Instructions | None:
    """What compiled products of matrices of `dtype` use on this machine's CPU; None: there are none for it."""
    able: Mapping[str, object] = torch.cpu.get_capabilities()
    if able.get("amx_tile") and not _may_use_amx():
        able = {name: has for name, has in able.items() if not name.startswith("amx_")}
    if dtype is torch.bfloat16:
        return bfloat16_instructions(able)
    return int8_instructions(able) if dtype is torch.int8 else None


@functools.cache
def _may_use_amx() -> bool:
    """Asks the kernel, which lets a process have AMX's registers when it asks, or not."""
    return bool(torch.cpu._init_amx())


def bfloat16_instructions(able: Mapping[str, object]) -> Instructions | None:
    """The fastest for matrices of bfloat16; `able` is torch.cpu.get_capabilities()."""
    if able.get("avx512_bf16"):
        return _wide(Arithmetic.DOT, amx=bool(able.get("amx_tile") and able.get("amx_bf16")))
    if able.get("avx512_f"):
        return _wide(Arithmetic.WIDEN)
    if able.get("avx2") and able.get("fma3"):
        return Instructions(Arithmetic.WIDEN, lanes=8, vectors=2, rows=_VECTOR_ROWS)
    return None


def int8_instructions(able: Mapping[str, object]) -> Instructions | None:
    """The fastest for matrices of int8."""
    if able.get("avx512_vnni"):
        return _wide(Arithmetic.INTEGER, amx=bool(able.get("amx_tile") and able.get("amx_int8")))
    if able.get("avx_vnni"):
        return Instructions(Arithmetic.INTEGER, lanes=8, vectors=2, rows=_VECTOR_ROWS)
    return None


def _wide(arithmetic: Arithmetic, amx: bool = False) -> Instructions:
    rows = AMX_ROWS if amx else _VECTOR_ROWS
    return Instructions(arithmetic, lanes=16, vectors=4, rows=rows, amx=amx)
