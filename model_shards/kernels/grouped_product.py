"""x W^T of many matrices, each by its own rows, with the matrices laid out for a stream of reads.

Shapes: E matrices, O outputs and I inputs, P rows that lie matrix after matrix.

    W [O, I]  ->  [tiles, words, width, word_inputs]      O = tiles * width, I = words * word_inputs, both rounded up

so that a tile is read from its first byte to its last, and each register that is loaded holds one word of `lanes`
outputs. What is added in rounding up is zeros.
"""

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from model_shards.kernels.instructions import Arithmetic, Instructions
from model_shards.kernels.machine_code import TeamFunction
from model_shards.kernels.product_ir import ARGUMENTS, product_ir
from model_shards.kernels.program import Call

# Threads are woken for no less than this much of weights to read.
BYTES_OF_A_TEAM = 2**18


@dataclass(frozen=True)
class Scaling:
    """What makes numbers of integer products: (x W^T - zero_sums) * scales * row_scales."""

    zero_sums: torch.Tensor  # [E, padded_outputs] int32
    scales: torch.Tensor  # [E, padded_outputs] float32
    row_scales: torch.Tensor  # [P] or [P, 1] float32


@dataclass(frozen=True)
class Rows:
    """Where the rows of a product lie in memory."""

    address: int  # of the first matrix's first row
    row: int  # bytes from row to row
    matrix: int = 0  # bytes from a matrix's first row to the next one's, beside the rows that lie between
    apart: bool = True  # a matrix's rows come after those of the matrices before; else each matrix has as many

    @staticmethod
    def of(rows: torch.Tensor) -> "Rows":
        """All rows of [P, ...], one after another."""
        return Rows(rows.data_ptr(), rows.stride(0) * rows.element_size())


class PackedMatrices:
    """E matrices, laid out. For x of `instructions.operand_dtype`."""

    def __init__(self, weight: torch.Tensor, instructions: Instructions) -> None:
        """Copies weight [E, O, I] of `instructions.weight_dtype`."""
        self.instructions = instructions
        self.num_outputs, self._num_inputs = weight.shape[1:]
        self._tiles = -(-self.num_outputs // instructions.width)
        self._words = -(-self._num_inputs // instructions.word_inputs)
        self._multiplies_by = instructions.for_words(self._words)
        self._packed = self._lay_out(weight)

    @property
    def padded_outputs(self) -> int:
        """O, rounded up to whole tiles."""
        return self._tiles * self.instructions.width

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
        assert x.dtype is self.instructions.operand_dtype, "x is laid out for these instructions"
        assert (scaling is not None) == (self.instructions.arithmetic is Arithmetic.INTEGER), "integers are scaled"
        missing = self._words * self.instructions.word_inputs - self._num_inputs
        x = F.pad(x, (0, missing)) if missing else x.contiguous()
        # Whole tiles are written: past O there must be room that nobody uses.
        direct = out is not None and self.padded_outputs == self.num_outputs and out.stride(-1) == 1
        target = out if out is not None and direct else torch.empty(sum(counts), self.padded_outputs)
        used = sum(1 for count in counts if count)
        # All or one: a team that shrinks ends threads, and makes them anew when it grows.
        threads = torch.get_num_threads() if used * self._matrix_bytes >= BYTES_OF_A_TEAM else 1
        rows = (ctypes.c_int64 * len(counts))(*counts)
        call = self.call(
            replace(Rows.of(x), apart=not shared),
            Rows.of(target),
            ctypes.addressof(rows),
            matrices=slice(first, first + len(counts)),
            scaling=scaling,
        )
        call.run(threads)
        if direct:
            return target
        product = target if self.padded_outputs == self.num_outputs else target[:, : self.num_outputs]
        return product if out is None else out[:, : self.num_outputs].copy_(product)

    def call(
        self,
        x: Rows,
        out: Rows,
        counts: int,
        matrices: slice = slice(None),
        narrow: bool = False,
        scaling: Scaling | None = None,
    ) -> Call:
        """The product as a part of a program: `counts` is the address of one int64 for each of these matrices.

        Rows of `out` have room for `padded_outputs` numbers, float32 or, narrow, bfloat16. What `scaling` holds and
        these matrices must live as long as the call.
        """
        first, stop, _ = matrices.indices(len(self._packed))
        return Call(
            _code(self._multiplies_by, narrow),
            ARGUMENTS,
            x=x.address,
            x_row=x.row,
            x_matrix=x.matrix,
            x_apart=int(x.apart),
            out=out.address,
            out_row=out.row,
            out_matrix=out.matrix,
            out_apart=int(out.apart),
            weights=self._packed.data_ptr() + first * self._matrix_bytes,
            matrix_bytes=self._matrix_bytes,
            counts=counts,
            num_matrices=stop - first,
            words=self._words,
            tiles=self._tiles,
            zero_sums=0 if scaling is None else scaling.zero_sums.data_ptr(),
            scales=0 if scaling is None else scaling.scales.data_ptr(),
            row_scales=0 if scaling is None else scaling.row_scales.data_ptr(),
        )

    @property
    def address(self) -> int:
        """Of the first matrix."""
        return self._packed.data_ptr()

    @property
    def nbytes(self) -> int:
        """Bytes of all matrices."""
        return self._packed.nbytes

    @property
    def _matrix_bytes(self) -> int:
        return self._tiles * self._words * self.instructions.width * 4

    def _lay_out(self, weight: torch.Tensor) -> torch.Tensor:
        how = self.instructions
        packed = torch.empty(weight.shape[0], self._tiles, self._words, how.width, dtype=torch.int32)
        missing = (0, self._words * how.word_inputs - self._num_inputs, 0, self.padded_outputs - self.num_outputs)
        for matrix, place in zip(weight, packed, strict=True):
            whole = F.pad(matrix, missing) if any(missing) else matrix.contiguous()
            # [tiles, width, words]: a word as one number
            place.copy_(whole.view(torch.int32).view(self._tiles, how.width, self._words).transpose(1, 2))
        return packed


@functools.cache
def _code(instructions: Instructions, narrow: bool) -> TeamFunction:
    return TeamFunction(product_ir(instructions, narrow))
