"""x W^T of many matrices, each by its own rows, with the matrices laid out for a stream of reads.

Shapes: E matrices, O outputs and I inputs, P rows that lie matrix after matrix.

    W [O, I]  ->  [tiles, words, width, word_inputs]      O = tiles * width, I = words * word_inputs, both rounded up

so that a tile is read from its first byte to its last, and each register that is loaded holds one word of `lanes`
outputs. What is added in rounding up is zeros.
"""

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from model_shards.kernels.instructions import Arithmetic, Instructions
from model_shards.kernels.machine_code import TeamFunction
from model_shards.kernels.product_ir import ARGUMENTS, product_ir

# Threads are woken for no less than this much of weights to read.
_BYTES_OF_A_TEAM = 2**18


@dataclass(frozen=True)
class Scaling:
    """What makes numbers of integer products: (x W^T - zero_sums) * scales * row_scales."""

    zero_sums: torch.Tensor  # [E, padded_outputs] int32
    scales: torch.Tensor  # [E, padded_outputs] float32
    row_scales: torch.Tensor  # [P] or [P, 1] float32


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

    def multiply(self, x: torch.Tensor, counts: Sequence[int], out: torch.Tensor | None = None) -> torch.Tensor:
        """[P, I] -> [P, O] float32: the first counts[0] rows by matrix 0, and so on.

        Into the first O elements of the rows of `out` if it is given, whose rows may be longer and lie apart.
        """
        assert sum(counts) == x.shape[0], "each row belongs to a matrix"
        return self._run(x, counts, out)

    def multiply_each(self, x: torch.Tensor, matrices: slice, out: torch.Tensor) -> None:
        """All rows [P, I] by each of some matrices, into out as `multiply` does: P rows of the first, and so on."""
        count = matrices.stop - matrices.start
        self._run(x, (x.shape[0],) * count, out, first=matrices.start, shared=True)

    def multiply_scaled(self, x: torch.Tensor, counts: Sequence[int], scaling: Scaling) -> torch.Tensor:
        """`multiply` of integers."""
        assert sum(counts) == x.shape[0], "each row belongs to a matrix"
        return self._run(x, counts, None, scaling=scaling)

    def _run(
        self,
        x: torch.Tensor,
        counts: Sequence[int],
        out: torch.Tensor | None,
        first: int = 0,
        shared: bool = False,
        scaling: Scaling | None = None,
    ) -> torch.Tensor:
        assert x.dtype is self._how.operand_dtype, "x is laid out for these instructions"
        assert (scaling is not None) == (self._how.arithmetic is Arithmetic.INTEGER), "integers are scaled"
        missing = self._words * self._how.word_inputs - self._num_inputs
        x = F.pad(x, (0, missing)) if missing else x.contiguous()
        # Whole tiles are written: past O there must be room that nobody uses.
        direct = out is not None and self.padded_outputs == self._num_outputs and out.stride(-1) == 1
        target = out if out is not None and direct else torch.empty(sum(counts), self.padded_outputs)
        used = sum(1 for count in counts if count)
        # All or one: a team that shrinks ends threads, and makes them anew when it grows.
        threads = torch.get_num_threads() if used * self._matrix_bytes >= _BYTES_OF_A_TEAM else 1
        rows = (ctypes.c_int64 * len(counts))(*counts)
        arguments = (ctypes.c_int64 * len(ARGUMENTS))(
            *(
                x.data_ptr(),
                0 if shared else 1,
                target.data_ptr(),
                4 * target.stride(0),
                self._packed.data_ptr() + first * self._matrix_bytes,
                self._matrix_bytes,
                ctypes.addressof(rows),
                len(counts),
                self._words,
                self._tiles,
                0 if scaling is None else scaling.zero_sums.data_ptr(),
                0 if scaling is None else scaling.scales.data_ptr(),
                0 if scaling is None else scaling.row_scales.data_ptr(),
            )
        )
        self._code.run(arguments, threads)
        if direct:
            return target
        product = target if self.padded_outputs == self._num_outputs else target[:, : self._num_outputs]
        return product if out is None else out[:, : self._num_outputs].copy_(product)

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


@functools.cache
def _code(instructions: Instructions) -> TeamFunction:
    return TeamFunction(product_ir(instructions))
