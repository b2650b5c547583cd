"""Attention on a CPU: float32 products over blocks that fit its caches, whatever dtype the model has; what is absorbed
from the cache of a bfloat16 model is one compiled call where the CPU multiplies bfloat16
(`model_shards.kernels.decode_attention`). Where layers are programs (`model_shards.compiled`) only absorbed chunks come
here, and decodes from caches of odd or very large blocks.

Shapes: T tokens, N heads, R kv_lora_rank, P qk_nope_head_dim, O qk_rope_head_dim, V v_head_dim,
D decodes, d those of a group, L their longest context, Q new and C context tokens of one prefill chunk, B keys of a
block, n heads of a tile.

    context   [ block | block | ... | block ][ new tokens ]      the new ones are blocks too, masked where they see
              0                          C - Q            C      themselves only in part, left out where not at all

Memory beside the cache, whatever C: one block of latents (B rows of R + O), its keys and values of a few heads, one
tile of scores, and the state of the running softmax, Q * N * V (absorbed: R in place of V) numbers.
"""

from collections.abc import Iterator

import torch

from model_shards.attention_plan import AttentionPlan, DecodeGroup, PrefillSpan
from model_shards.config import ModelConfig
from model_shards.kernels.decode_attention import can_decode, decode_attention
from model_shards.kv_cache import LatentKVCache
from model_shards.rope import attention_scale
from model_shards.scratch import Workspace
from model_shards.softmax_blocks import RunningSoftmax
from model_shards.up_projection import UpProjections, lay_out_for_cpu, split_heads

# Rows of the cache read at once: of 576 float32 each 1.2 MB for a decode, which are read twice from the second-level
# cache, and 2.4 MB for a prefill chunk, whose every head expands them once.
_DECODE_BLOCK = 512
_PREFILL_BLOCK = 1024
# Queries and keys of one tile; its scores are at most the square of it, 1 MB, over as many heads as that allows.
_TILE = 512
# Keys of one block expanded at once, over the heads of a tile.
_EXPANDED_KEYS = 4096


class BlockwiseAttention:
    """Decodes and short chunks of long contexts absorbed, other chunks expanded, whichever multiplies less."""

    def __init__(self, config: ModelConfig) -> None:
        self._num_heads = config.num_attention_heads
        self._kv_lora_rank = config.kv_lora_rank
        self._nope_dim = config.qk_nope_head_dim
        self._rope_dim = config.qk_rope_head_dim
        self._v_dim = config.v_head_dim
        self._scale = attention_scale(config)

    def lay_out(self, kv_b_weight: torch.Tensor) -> UpProjections:
        """Copies."""
        return lay_out_for_cpu(split_heads(kv_b_weight, self._num_heads, self._nope_dim))

    def queries(self, projected: torch.Tensor) -> torch.Tensor:
        """In float32."""
        return projected.float().view(-1, self._num_heads, self._nope_dim + self._rope_dim)

    def attend(
        self, layer: int, queries: torch.Tensor, plan: AttentionPlan, kv_cache: LatentKVCache, up: UpProjections
    ) -> torch.Tensor:
        """See `AttentionCore`."""
        out = queries.new_empty((queries.shape[0], self._num_heads, self._v_dim))  # [T, N, V]
        if plan.num_decodes:
            self._decode(layer, queries, plan, kv_cache, up, out)
        for span in plan.prefills:
            tokens = slice(span.start, span.stop)
            if self.absorbing_is_less(span.stop - span.start, span.context):
                self._absorbed(layer, queries[tokens], span, kv_cache, up, out[tokens])
            else:
                self._expanded(layer, queries[tokens], span, kv_cache, up, out[tokens])
        return out

    def decode(
        self, layer: int, queries: torch.Tensor, plan: AttentionPlan, kv_cache: LatentKVCache, up: UpProjections
    ) -> torch.Tensor:
        """`attend` of the decodes alone: queries [D, N, P + O] -> [D, N, V]."""
        out = queries.new_empty((queries.shape[0], self._num_heads, self._v_dim))
        self._decode(layer, queries, plan, kv_cache, up, out)
        return out

    def absorbed(
        self, layer: int, queries: torch.Tensor, span: PrefillSpan, kv_cache: LatentKVCache, up: UpProjections
    ) -> torch.Tensor:
        """`attend` of one chunk whose context is not expanded: queries [Q, N, P + O] -> [Q, N, V]."""
        out = queries.new_empty((queries.shape[0], self._num_heads, self._v_dim))
        self._absorbed(layer, queries, span, kv_cache, up, out)
        return out

    def absorbing_is_less(self, new: int, context: int) -> bool:
        """Multiplications of a head: taking the queries to the latents, against expanding the context."""
        expand = self._kv_lora_rank * (self._nope_dim + self._v_dim)
        wide = 2 * self._kv_lora_rank + self._rope_dim
        narrow = self._nope_dim + self._rope_dim + self._v_dim
        return new * expand + new * context * wide < context * expand + new * context * narrow

    def _latent_queries(self, queries: torch.Tensor, up: UpProjections) -> torch.Tensor:
        """[N, D, R + O] of queries [D, N, P + O]: what a head asks of the latents themselves."""
        rank = self._kv_lora_rank
        absorbed = queries.new_empty((self._num_heads, queries.shape[0], rank + self._rope_dim))
        by_head = queries.transpose(0, 1)
        up.absorb(by_head[..., : self._nope_dim], absorbed)
        absorbed[..., rank:] = by_head[..., self._nope_dim :]
        return absorbed

    # --- decodes ------------------------------------------------------------------------------------------------

    def _decode(
        self,
        layer: int,
        queries: torch.Tensor,
        plan: AttentionPlan,
        kv_cache: LatentKVCache,
        up: UpProjections,
        out: torch.Tensor,
    ) -> None:
        """Writes the first D rows of out: the up-projections are products over all decodes, heads the batch; between
        them the heads are the rows of one product per sequence."""
        count = plan.num_decodes
        if can_decode(kv_cache):
            self._compiled(layer, queries[:count], plan.block_tables, plan.lengths, kv_cache, up, out[:count])
            return
        own = queries[:count] if plan.decode_order is None else queries[plan.decode_order]  # [D, N, P + O]
        absorbed = self._latent_queries(own, up)  # [N, D, R + O]
        mixed = absorbed.new_empty((self._num_heads, count, self._kv_lora_rank))
        first = 0
        for group in plan.decodes:
            members = slice(first, first + group.rows.shape[0])
            first = members.stop
            self._mix(layer, absorbed[:, members], group, kv_cache, mixed[:, members])
        if plan.decode_order is None:
            out[:count] = up.value(mixed).transpose(0, 1)
        else:
            out[plan.decode_order] = up.value(mixed).transpose(0, 1)

    def _compiled(
        self,
        layer: int,
        queries: torch.Tensor,  # [D, N, P + O]
        block_tables: torch.Tensor,  # [D, ...]
        lengths: torch.Tensor,  # [D]
        kv_cache: LatentKVCache,
        up: UpProjections,
        out: torch.Tensor,  # [D, N, V]
    ) -> None:
        absorbed = self._latent_queries(queries, up)[..., : self._kv_lora_rank]  # [N, D, R]
        latent_queries = absorbed.transpose(0, 1).to(torch.bfloat16, memory_format=torch.contiguous_format)
        rope_queries = queries[..., self._nope_dim :].bfloat16()
        mixed = decode_attention(latent_queries, rope_queries, kv_cache, layer, block_tables, lengths, self._scale)
        out.copy_(up.value(mixed.transpose(0, 1).float()).transpose(0, 1))

    def _mix(
        self, layer: int, absorbed: torch.Tensor, group: DecodeGroup, kv_cache: LatentKVCache, mixed: torch.Tensor
    ) -> None:
        """Attends from absorbed [N, d, R + O] to the latents themselves: mixed [N, d, R]."""
        query = absorbed.permute(1, 2, 0)  # [d, R + O, N]
        length = group.slots.shape[1]
        if length <= _DECODE_BLOCK:
            latents = kv_cache.read(layer, group.slots, group.run)  # [d, L, R + O]
            weights = self._decode_scores(latents, query, group.padding, kv_cache.workspace).softmax(dim=1)  # [d, L, N]
            torch.bmm(weights.transpose(1, 2), latents[..., : self._kv_lora_rank], out=mixed.transpose(0, 1))
            return
        state = RunningSoftmax.empty(query.shape[0], self._num_heads, self._kv_lora_rank)
        for start in range(0, length, _DECODE_BLOCK):
            keys = slice(start, min(start + _DECODE_BLOCK, length))
            run = None if group.run is None else group.run + start
            latents = kv_cache.read(layer, group.slots[:, keys], run)
            padding = None if group.padding is None else group.padding[:, keys]
            scores = self._decode_scores(latents, query, padding, kv_cache.workspace)
            state.add(scores.transpose(1, 2), latents[..., : self._kv_lora_rank])
        state.finish(mixed.transpose(0, 1))

    def _decode_scores(
        self, latents: torch.Tensor, query: torch.Tensor, padding: torch.Tensor | None, workspace: Workspace
    ) -> torch.Tensor:
        """[d, B, N], keys first: the long side as rows makes the faster product."""
        scores = workspace.scores.take(latents.shape[0], latents.shape[1], self._num_heads)
        scores.baddbmm_(latents, query, beta=0, alpha=self._scale)
        if padding is not None:
            scores.masked_fill_(padding[..., None], float("-inf"))
        return scores

    # --- prefill chunks -----------------------------------------------------------------------------------------

    def _expanded(
        self,
        layer: int,
        queries: torch.Tensor,  # [Q, N, P + O]
        span: PrefillSpan,
        kv_cache: LatentKVCache,
        up: UpProjections,
        out: torch.Tensor,  # [Q, N, V]
    ) -> None:
        by_head = queries.transpose(0, 1)  # [N, Q, P + O]
        state = RunningSoftmax.empty(self._num_heads, queries.shape[0], self._v_dim)
        for start, stop in _blocks(span):
            latents = kv_cache.read(layer, span.slots[start:stop])  # [B, R + O]
            kv_c, k_pe = torch.split(latents, [self._kv_lora_rank, self._rope_dim], dim=-1)
            for heads in self._head_groups(queries.shape[0], stop - start):
                count = heads.stop - heads.start
                key = kv_cache.workspace.keys.take(
                    count, stop - start, self._nope_dim + self._rope_dim
                )  # [n, B, P + O]
                value = kv_cache.workspace.values.take(count, stop - start, self._v_dim)  # [n, B, V]
                up.expand_keys(kv_c, heads, key)
                key[..., self._nope_dim :] = k_pe
                up.expand_values(kv_c, heads, value)
                everything = slice(0, queries.shape[0])
                self._attend_block(
                    by_head[heads], key, value, start - span.past, state.part(heads, everything), kv_cache.workspace
                )
        state.finish(out.transpose(0, 1))

    def _absorbed(
        self,
        layer: int,
        queries: torch.Tensor,  # [Q, N, P + O]
        span: PrefillSpan,
        kv_cache: LatentKVCache,
        up: UpProjections,
        out: torch.Tensor,  # [Q, N, V]
    ) -> None:
        if can_decode(kv_cache):
            # Each new token is one more decode, of all before it and itself.
            tables = span.block_table.expand(queries.shape[0], -1)
            self._compiled(layer, queries, tables, span.visible_lengths, kv_cache, up, out)
            return
        absorbed = self._latent_queries(queries, up)  # [N, Q, R + O]
        state = RunningSoftmax.empty(self._num_heads, queries.shape[0], self._kv_lora_rank)
        for start, stop in _blocks(span):
            latents = kv_cache.read(layer, span.slots[start:stop])  # [B, R + O]
            for heads in self._head_groups(queries.shape[0], stop - start):
                key = latents.expand(heads.stop - heads.start, -1, -1)
                everything = slice(0, queries.shape[0])
                part = state.part(heads, everything)
                self._attend_block(
                    absorbed[heads], key, key[..., : self._kv_lora_rank], start - span.past, part, kv_cache.workspace
                )
        mixed = torch.empty_like(state.weighted)  # [N, Q, R]
        state.finish(mixed)
        out.copy_(up.value(mixed).transpose(0, 1))

    def _head_groups(self, new: int, keys: int) -> Iterator[slice]:
        """Heads of one tile: as many as its scores and its keys have room for."""
        tile = min(new, _TILE) * min(keys, _TILE)
        step = max(1, min(self._num_heads, _TILE * _TILE // tile, _EXPANDED_KEYS // keys))
        for first in range(0, self._num_heads, step):
            yield slice(first, min(first + step, self._num_heads))

    def _attend_block(
        self,
        query: torch.Tensor,  # [n, Q, K]
        key: torch.Tensor,  # [n, B, K]
        value: torch.Tensor,  # [n, B, V]
        offset: int,  # of the first key from the first query: below 0 in the past, which every query sees
        state: RunningSoftmax,
        workspace: Workspace,
    ) -> None:
        """Takes one block into the state, tile by tile. A block with an offset below 0 must end before 0."""
        heads, new, width = query.shape[0], query.shape[1], key.shape[1]
        for first in range(0, new, _TILE):
            rows = slice(first, min(first + _TILE, new))
            for begin in range(0, width, _TILE):
                columns = slice(begin, min(begin + _TILE, width))
                if offset >= 0 and offset + columns.start >= rows.stop:
                    break  # later than each of these queries
                scores = workspace.scores.take(heads, rows.stop - rows.start, columns.stop - columns.start)
                scores.baddbmm_(query[:, rows], key[:, columns].transpose(1, 2), beta=0, alpha=self._scale)
                ahead = offset + columns.start - rows.start  # of the first key from the first query of the tile
                if offset >= 0 and ahead + scores.shape[2] - 1 > 0:
                    later = torch.ones(scores.shape[1:], dtype=torch.bool).triu_(1 - ahead)
                    scores.masked_fill_(later, float("-inf"))
                state.part(slice(None), rows).add(scores, value[:, columns])


def _blocks(span: PrefillSpan) -> Iterator[tuple[int, int]]:
    """(start, stop) of blocks of the context: the past, then the new tokens, so that no block is of both."""
    for begin, end in ((0, span.past), (span.past, span.context)):
        for start in range(begin, end, _PREFILL_BLOCK):
            yield start, min(start + _PREFILL_BLOCK, end)
