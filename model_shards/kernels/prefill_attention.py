"""Attention of a prefill chunk to its whole context, expanded block after block (model_shards.kernels.prefill_ir).

Shapes: Q new and C context tokens, N heads, P qk_nope_head_dim, O qk_rope_head_dim, R kv_lora_rank, V v_head_dim.

Memory, whatever C: keys and values of a block, N * BLOCK * (P + O + V) bfloat16, and the sums, N * Q * V float32.
"""

from collections.abc import Callable

import torch

from model_shards.kernels.grouped_product import PackedMatrices
from model_shards.kernels.instructions import Arithmetic, Instructions
from model_shards.kernels.prefill_ir import (
    ATTEND_ARGUMENTS,
    BLOCK,
    EXPAND_ARGUMENTS,
    TILE,
    TRANSPOSE_ARGUMENTS,
    HeadShape,
    attend,
    expand,
    transpose,
)
from model_shards.kernels.program import Call, Program, float_bits
from model_shards.scratch import Scratch

_CPU = torch.device("cpu")


class PrefillAttention:
    """Memory and programs, for one thread; every layer and chunk in turn."""

    def __init__(self, shape: HeadShape, heads: int, scale: float, instructions: Instructions) -> None:
        """`instructions`: those that W_UV is laid out for."""
        self._shape, self._heads = shape, heads
        self._instructions = instructions
        how = instructions.for_words(shape.rank // 2).for_words(shape.key_words)
        self._latents = torch.zeros(BLOCK, shape.rank + shape.rope, dtype=torch.bfloat16)
        self._words = torch.empty(BLOCK * shape.latent_words, dtype=torch.int32)
        self._keys = torch.empty(heads * shape.key_bytes, dtype=torch.uint8)
        self._values = torch.empty(heads * shape.value_bytes, dtype=torch.uint8)
        self._sums, self._totals = Scratch(torch.float32, _CPU), Scratch(torch.float32, _CPU)
        latents, words = self._latents.data_ptr(), self._words.data_ptr()
        expanded = {"keys": self._keys.data_ptr(), "values": self._values.data_ptr()}
        self._transpose = Call(transpose(shape), TRANSPOSE_ARGUMENTS, tiles=0, latents=latents, words=words)
        self._expand = Call(
            expand(shape, how),
            EXPAND_ARGUMENTS,
            tiles=0,
            heads=heads,
            latents=latents,
            words=words,
            w_uk=0,
            w_uv=0,
            **expanded,
        )
        of_chunk = dict.fromkeys(("new", "past", "start", "is_last", "tiles", "queries", "sums", "totals", "out"), 0)
        self._attend = Call(
            attend(shape, how), ATTEND_ARGUMENTS, heads=heads, scale=float_bits(scale), **expanded, **of_chunk
        )
        self._program = Program([self._transpose, self._expand, self._attend])

    def attend(
        self,
        queries: torch.Tensor,  # [Q, N, P + O] bfloat16, rotated
        latents: Callable[[int, int], torch.Tensor],  # (start, stop) -> [stop - start, R + O] bfloat16 of the context
        context: int,  # C
        w_uk: torch.Tensor,  # [N, P, R] bfloat16
        w_uv: PackedMatrices,  # N of [V, R], for the same instructions
        out: torch.Tensor,  # [Q, N, V] bfloat16
        num_threads: int,
    ) -> None:
        """Writes out; each of the last Q tokens of the context attends to all before it and itself."""
        assert queries.is_contiguous(), "heads lie one after another"
        assert out.is_contiguous(), "heads lie one after another"
        assert w_uk.is_contiguous(), "heads lie one after another"
        assert w_uv.instructions == self._instructions, "laid out for these products"
        new = queries.shape[0]
        self._expand.set(w_uk=w_uk.data_ptr(), w_uv=w_uv.address)
        self._attend.set(
            new=new,
            past=context - new,
            queries=queries.data_ptr(),
            out=out.data_ptr(),
            sums=self._sums.take(self._heads, new, self._shape.value).data_ptr(),
            totals=self._totals.take(self._heads, new, 2).data_ptr(),
        )
        for start in range(0, context, BLOCK):
            stop = min(start + BLOCK, context)
            tiles = -(-(stop - start) // TILE)
            self._latents[: stop - start] = latents(start, stop)
            # Keys past the end have no weight, but what is multiplied by none must be a number.
            self._latents[stop - start : tiles * TILE] = 0
            self._transpose.set(tiles=tiles)
            self._expand.set(tiles=tiles)
            self._attend.set(tiles=tiles, start=start, is_last=int(stop == context))
            self._program.run(num_threads)


def serves(shape: HeadShape, instructions: Instructions) -> bool:
    """Whether there is compiled code for heads of these sizes."""
    if instructions.arithmetic is not Arithmetic.DOT or instructions.width != TILE:
        return False
    return shape.value % TILE == 0 and all(size % 2 == 0 for size in (shape.nope, shape.rope, shape.rank))
