"""What expands latents to keys and values: the two halves of `kv_b_proj`, head by head.

Shapes: N heads, P qk_nope_head_dim, V v_head_dim, R kv_lora_rank, D rows of each head, B latents, n heads of a slice.
"""

from dataclasses import dataclass
from typing import Protocol

import torch

from model_shards.kernels.grouped_product import PackedMatrices
from model_shards.kernels.instructions import Instructions, choose_instructions


class UpProjections(Protocol):
    """W_UK and W_UV (DeepSeek-V2, section 2.1.2) as an attention on a CPU multiplies by them: float32 in and out."""

    def absorb(self, q_nope: torch.Tensor, out: torch.Tensor) -> None:
        """q W_UK: [N, D, P] into the first R elements of each row of out [N, D, ...]."""
        ...

    def value(self, mixed: torch.Tensor) -> torch.Tensor:
        """c W_UV^T: [N, D, R] -> [N, D, V]."""
        ...

    def expand_keys(self, kv_c: torch.Tensor, heads: slice, out: torch.Tensor) -> None:
        """W_UK c of some heads: [B, R] into the first P elements of each row of out [n, B, ...]."""
        ...

    def expand_values(self, kv_c: torch.Tensor, heads: slice, out: torch.Tensor) -> None:
        """W_UV c of some heads: [B, R] into out [n, B, V]."""
        ...


@dataclass(frozen=True)
class DenseUpProjections:
    """As tensors, of any device and dtype."""

    w_uk: torch.Tensor  # [N, P, R]: k_nope = W_UK c
    w_uv: torch.Tensor  # [N, R, V]: transposed, v = c W_UV

    def absorb(self, q_nope: torch.Tensor, out: torch.Tensor) -> None:
        """See `UpProjections`."""
        torch.bmm(q_nope, self.w_uk, out=out[..., : self.w_uk.shape[2]])

    def value(self, mixed: torch.Tensor) -> torch.Tensor:
        """See `UpProjections`."""
        return torch.bmm(mixed, self.w_uv)

    def expand_keys(self, kv_c: torch.Tensor, heads: slice, out: torch.Tensor) -> None:
        """See `UpProjections`."""
        w_uk = self.w_uk[heads]
        torch.bmm(kv_c.expand(len(w_uk), -1, -1), w_uk.transpose(1, 2), out=out[..., : w_uk.shape[1]])

    def expand_values(self, kv_c: torch.Tensor, heads: slice, out: torch.Tensor) -> None:
        """See `UpProjections`."""
        w_uv = self.w_uv[heads]
        torch.bmm(kv_c.expand(len(w_uv), -1, -1), w_uv, out=out)


class PackedUpProjections:
    """Laid out for the CPU at hand, in bfloat16; W_UK once for each way that it is multiplied."""

    def __init__(self, dense: DenseUpProjections, instructions: Instructions, expands: bool = True) -> None:
        """Without `expands` there is no `expand_keys`, and no copy of W_UK for it."""
        self._operand = instructions.operand_dtype
        self.absorbing = PackedMatrices(dense.w_uk.transpose(1, 2), instructions)  # N of [R, P]
        self._keys = PackedMatrices(dense.w_uk, instructions) if expands else None  # N of [P, R]
        self.valuing = PackedMatrices(dense.w_uv.transpose(1, 2), instructions)  # N of [V, R]

    def absorb(self, q_nope: torch.Tensor, out: torch.Tensor) -> None:
        """See `UpProjections`."""
        heads, rows, _ = q_nope.shape
        self.absorbing.multiply(self._rows(q_nope), (rows,) * heads, out.flatten(0, 1))

    def value(self, mixed: torch.Tensor) -> torch.Tensor:
        """See `UpProjections`."""
        heads, rows, _ = mixed.shape
        return self.valuing.multiply(self._rows(mixed), (rows,) * heads).view(heads, rows, -1)

    def expand_keys(self, kv_c: torch.Tensor, heads: slice, out: torch.Tensor) -> None:
        """See `UpProjections`."""
        assert self._keys is not None, "laid out to be expanded"
        self._keys.multiply_each(kv_c.to(self._operand), heads, out.flatten(0, 1))

    def expand_values(self, kv_c: torch.Tensor, heads: slice, out: torch.Tensor) -> None:
        """See `UpProjections`."""
        self.valuing.multiply_each(kv_c.to(self._operand), heads, out.flatten(0, 1))

    def _rows(self, x: torch.Tensor) -> torch.Tensor:
        """[N, D, ...] -> [N * D, ...]."""
        return x.to(self._operand).reshape(-1, x.shape[-1])


def split_heads(weight: torch.Tensor, num_heads: int, nope_dim: int) -> DenseUpProjections:
    """Views of kv_b_proj's weight [N * (P + V), R], whose rows are [P | V] head after head."""
    per_head = weight.view(num_heads, -1, weight.shape[-1])
    return DenseUpProjections(per_head[:, :nope_dim], per_head[:, nope_dim:].transpose(1, 2))


def lay_out_for_cpu(dense: DenseUpProjections) -> UpProjections:
    """Copies as this CPU multiplies them fastest: bfloat16 packed where it can be, else float32, contiguous where a
    product of few rows reads them. The weight itself may go."""
    instructions = choose_instructions(dense.w_uk.dtype)
    if instructions is not None:
        return PackedUpProjections(dense, instructions)
    return DenseUpProjections(_widened(dense.w_uk), _widened(dense.w_uv))


def laid_out_bytes(nope_dim: int, v_dim: int, elements: int, dtype: torch.dtype) -> int:
    """What `lay_out_for_cpu` holds of a weight with `elements` in all, [N * (P + V), R]."""
    if choose_instructions(dtype) is None:
        return 4 * elements
    return dtype.itemsize * elements * (2 * nope_dim + v_dim) // (nope_dim + v_dim)


def _widened(part: torch.Tensor) -> torch.Tensor:
    return part.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
