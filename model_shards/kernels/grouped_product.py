"""x W^T of many matrices, each by its own rows, with the matrices laid out for a stream of reads.

Shapes: E matrices, O outputs and I inputs, P rows that lie matrix after matrix.

    W [O, I]  ->  [tiles, words, width, word_inputs]      O = tiles * width, I = words * word_inputs, both rounded up

so that a tile is read from its first byte to its last, and each register that is loaded holds one word of `lanes`
outputs. What is added in rounding up is zeros.
"""

import ctypes
import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from model_shards.kernels.instructions import Instructions
from model_shards.kernels.machine_code import Compiled, OpenMP, find_openmp
from model_shards.kernels.product_ir import ARGUMENTS, PARALLEL, SERIAL, product_ir

# Threads are woken for no less than this much of weights to read.
_BYTES_OF_A_THREAD = 2**17


class PackedMatrices:
    """E matrices, laid out. For x of `instructions.operand_dtype`."""

    def __init__(self, weight: torch.Tensor, instructions: Instructions) -> None:
        """Copies weight [E, O, I] of `instructions.weight_dtype`."""
        self._how = instructions
        self._num_outputs, self._num_inputs = weight.shape[1:]
        self._tiles = -(-self._num_outputs // instructions.width)
        self._words = -(-self._num_inputs // instructions.word_inputs)
        self._code = _code(instructions)
        self._packed = self._lay_out(weight)

    @property
    def padded_outputs(self) -> int:
        """O, rounded up to whole tiles."""
        return self._tiles * self._how.width

    def multiply(
        self,
        x: torch.Tensor,  # [P, I]
        counts: Sequence[int],  # of E
        zero_sums: torch.Tensor | None = None,  # [E, padded_outputs] int32
        scales: torch.Tensor | None = None,  # [E, padded_outputs] float32
        row_scales: torch.Tensor | None = None,  # [P] float32
    ) -> torch.Tensor:
        """[P, O] float32: the first counts[0] rows by matrix 0, and so on.

        Integers take the last three: (x W^T - zero_sums) * scales * row_scales.
        """
        assert sum(counts) == x.shape[0], "each row belongs to a matrix"
        assert x.dtype is self._how.operand_dtype, "x is laid out for these instructions"
        missing = self._words * self._how.word_inputs - self._num_inputs
        x = F.pad(x, (0, missing)) if missing else x.contiguous()
        out = torch.empty(x.shape[0], self.padded_outputs)
        used = sum(1 for count in counts if count)
        threads = min(torch.get_num_threads(), self._tiles, used * self._matrix_bytes // _BYTES_OF_A_THREAD)
        rows = (ctypes.c_int64 * len(counts))(*counts)
        values = {
            "x": x.data_ptr(),
            "out": out.data_ptr(),
            "weights": self._packed.data_ptr(),
            "matrix_bytes": self._matrix_bytes,
            "counts": ctypes.addressof(rows),
            "num_matrices": len(counts),
            "words": self._words,
            "tiles": self._tiles,
            "zero_sums": 0 if zero_sums is None else zero_sums.data_ptr(),
            "scales": 0 if scales is None else scales.data_ptr(),
            "row_scales": 0 if row_scales is None else row_scales.data_ptr(),
        }
        self._code.run((ctypes.c_int64 * len(ARGUMENTS))(*(values[name] for name in ARGUMENTS)), threads)
        return out if self.padded_outputs == self._num_outputs else out[:, : self._num_outputs]

    @property
    def _matrix_bytes(self) -> int:
        return self._tiles * self._words * self._how.width * 4

    def _lay_out(self, weight: torch.Tensor) -> torch.Tensor:
        how = self._how
        packed = torch.empty(weight.shape[0], self._tiles, self._words, how.width, dtype=torch.int32)
        missing = (0, self._words * how.word_inputs - self._num_inputs, 0, self.padded_outputs - self._num_outputs)
        for matrix, place in zip(weight, packed, strict=True):
            whole = F.pad(matrix, missing) if any(missing) else matrix.contiguous()
            # [tiles, width, words]: a word as one number
            place.copy_(whole.view(torch.int32).view(self._tiles, how.width, self._words).transpose(1, 2))
        return packed


class _Code:
    """The product compiled for one set of instructions."""

    def __init__(self, instructions: Instructions) -> None:
        self._openmp: OpenMP | None = find_openmp()
        self._compiled = Compiled(product_ir(instructions, self._openmp is not None))
        self._serial = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self._compiled.address(SERIAL))
        self._parallel = 0 if self._openmp is None else self._compiled.address(PARALLEL)

    def run(self, arguments: ctypes.Array[ctypes.c_int64], num_threads: int) -> None:
        address = ctypes.addressof(arguments)
        if self._openmp is None or num_threads <= 1:
            self._serial(address)
        else:
            self._openmp.run(self._parallel, address, num_threads)


@functools.cache
def _code(instructions: Instructions) -> _Code:
    return _Code(instructions)
