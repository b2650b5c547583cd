"""Attention by few large products and torch's fused kernels: what a GPU wants.

Shapes: T tokens, N heads, R kv_lora_rank, P qk_nope_head_dim, O qk_rope_head_dim, V v_head_dim,
D decodes of a group, L their longest context, Q new and C context tokens of one prefill chunk.
"""

import torch
import torch.nn.functional as F

from model_shards.attention_plan import AttentionPlan, DecodeGroup, PrefillSpan
from model_shards.config import ModelConfig
from model_shards.kv_cache import LatentKVCache
from model_shards.rope import attention_scale
from model_shards.up_projection import DenseUpProjections, UpProjections, split_heads

# Elements of expanded keys and values held at once (512 MB in bf16): a long context is expanded a few heads at a time.
_EXPANDED_ELEMENTS_LIMIT = 1 << 28


class FusedAttention:
    """Decodes absorbed, prefills expanded; in the dtype of the model."""

    def __init__(self, config: ModelConfig) -> None:
        self._num_heads = config.num_attention_heads
        self._kv_lora_rank = config.kv_lora_rank
        self._nope_dim = config.qk_nope_head_dim
        self._rope_dim = config.qk_rope_head_dim
        self._v_dim = config.v_head_dim
        self._scale = attention_scale(config)

    def lay_out(self, kv_b_weight: torch.Tensor) -> DenseUpProjections:
        """Views."""
        return split_heads(kv_b_weight, self._num_heads, self._nope_dim)

    def queries(self, projected: torch.Tensor) -> torch.Tensor:
        """The same memory."""
        return projected.view(-1, self._num_heads, self._nope_dim + self._rope_dim)

    def attend(
        self, layer: int, queries: torch.Tensor, plan: AttentionPlan, kv_cache: LatentKVCache, up: UpProjections
    ) -> torch.Tensor:
        """See `AttentionCore`."""
        assert isinstance(up, DenseUpProjections), "made by `lay_out` of this core"
        out = queries.new_empty((queries.shape[0], self._num_heads, self._v_dim))  # [T, N, V]
        for group in plan.decodes:
            latents = kv_cache.gather(layer, group.slots)  # [D, L, R + O]
            out[group.rows] = self._absorbed(queries[group.rows], latents, group, up)
        for span in plan.prefills:
            latents = kv_cache.gather(layer, span.slots)  # [C, R + O]
            tokens = slice(span.start, span.stop)
            self._expanded(queries[tokens], latents, span, up, out[tokens])
        return out

    def _absorbed(
        self, queries: torch.Tensor, latents: torch.Tensor, group: DecodeGroup, up: DenseUpProjections
    ) -> torch.Tensor:
        """[D, N, V]: every head queries the same latents, so heads are the rows of one product per sequence."""
        q_nope, q_pe = torch.split(queries, [self._nope_dim, self._rope_dim], dim=-1)
        q_latent = torch.bmm(q_nope.transpose(0, 1), up.w_uk).transpose(0, 1)  # [D, N, R]
        absorbed = torch.cat((q_latent, q_pe), dim=-1)  # [D, N, R + O]
        scores = torch.bmm(absorbed, latents.transpose(1, 2)).float() * self._scale  # [D, N, L]
        if group.padding is not None:
            scores.masked_fill_(group.padding[:, None], float("-inf"))
        probabilities = scores.softmax(dim=-1).to(latents.dtype)
        mixed = torch.bmm(probabilities, latents[..., : self._kv_lora_rank])  # [D, N, R]
        return torch.bmm(mixed.transpose(0, 1), up.w_uv).transpose(0, 1)

    def _expanded(
        self, queries: torch.Tensor, latents: torch.Tensor, span: PrefillSpan, up: DenseUpProjections, out: torch.Tensor
    ) -> None:
        """Writes [Q, N, V] into out, a few heads at a time when the context is long."""
        kv_c, k_pe = torch.split(latents, [self._kv_lora_rank, self._rope_dim], dim=-1)
        per_head = latents.shape[0] * (2 * self._nope_dim + self._rope_dim + 2 * self._v_dim)
        step = max(1, min(self._num_heads, _EXPANDED_ELEMENTS_LIMIT // per_head))
        for first in range(0, self._num_heads, step):
            heads = slice(first, first + step)
            k_nope = torch.matmul(kv_c, up.w_uk[heads].transpose(1, 2))  # [n, C, P]
            value = torch.matmul(kv_c, up.w_uv[heads])  # [n, C, V]
            key = torch.cat((k_nope, k_pe.expand(k_nope.shape[0], -1, -1)), dim=-1)  # [n, C, P + O]
            query = queries[:, heads].transpose(0, 1)  # [n, Q, P + O]
            out[:, heads] = self._attend(query, key, value, span.visible).transpose(0, 1)

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visible: torch.Tensor | None
    ) -> torch.Tensor:
        """[n, Q, V]. Values are widened to the keys' width: the fused kernels, which never hold [n, Q, C], ask it."""
        widened = F.pad(value, (0, max(0, key.shape[-1] - value.shape[-1])))
        attended = F.scaled_dot_product_attention(
            query[None], key[None], widened[None], attn_mask=visible, is_causal=visible is None, scale=self._scale
        )
        return attended[0, ..., : self._v_dim]
