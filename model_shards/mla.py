"""Multi-head latent attention (DeepSeek-V2, section 2.1) over the paged latent cache.

Shapes: T tokens, N heads, H hidden size, R kv_lora_rank, P qk_nope_head_dim, O qk_rope_head_dim, V v_head_dim,
D decodes of a group, L their longest context, Q new and C context tokens of one prefill chunk.

The same numbers two ways (appendix C):
    expanded   k = [W_UK c | k_pe], v = W_UV c        many queries share the cost of expanding the context
    absorbed   q.k = (W_UK^T q_nope).c + q_pe.k_pe    one query reads the latents as they lie, all heads at once
"""

import torch
import torch.nn.functional as F
from torch import nn

from model_shards.attention_plan import AttentionPlan, DecodeGroup, PrefillSpan
from model_shards.config import ModelConfig
from model_shards.kv_cache import LatentKVCache
from model_shards.linear import FrozenLinear
from model_shards.norm import LATENT_NORM_EPS, RMSNorm
from model_shards.rope import apply_rotary, attention_scale

# Elements of expanded keys and values held at once (512 MB in bf16): a long context is expanded a few heads at a time.
_EXPANDED_ELEMENTS_LIMIT = 1 << 28


class MultiHeadLatentAttention(nn.Module):
    """One layer's attention; parameter names are Hugging Face's."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.kv_lora_rank = config.kv_lora_rank
        self.nope_dim = config.qk_nope_head_dim
        self.rope_dim = config.qk_rope_head_dim
        self.v_dim = config.v_head_dim
        self.scale = attention_scale(config)
        hidden, bias = config.hidden_size, config.attention_bias
        q_out = self.num_heads * (self.nope_dim + self.rope_dim)
        self.q_lora = config.q_lora_rank is not None
        if config.q_lora_rank is None:
            self.q_proj = FrozenLinear(hidden, q_out, dtype, device)
        else:
            self.q_a_proj = FrozenLinear(hidden, config.q_lora_rank, dtype, device, bias)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, LATENT_NORM_EPS, dtype, device)
            self.q_b_proj = FrozenLinear(config.q_lora_rank, q_out, dtype, device)
        self.kv_a_proj_with_mqa = FrozenLinear(hidden, config.latent_dim, dtype, device, bias)
        self.kv_a_layernorm = RMSNorm(self.kv_lora_rank, LATENT_NORM_EPS, dtype, device)
        kv_out = self.num_heads * (self.nope_dim + self.v_dim)
        self.kv_b_proj = FrozenLinear(self.kv_lora_rank, kv_out, dtype, device)
        self.o_proj = FrozenLinear(self.num_heads * self.v_dim, hidden, dtype, device, bias)

    def forward(
        self,
        layer: int,
        hidden: torch.Tensor,  # [T, H]
        rotary: tuple[torch.Tensor, torch.Tensor],  # cos, sin, each [T, O / 2] float32
        slot_mapping: torch.Tensor,  # [T] int64
        plan: AttentionPlan,
        kv_cache: LatentKVCache,
    ) -> torch.Tensor:
        """[T, H]. Writes the tokens' latents into the cache first, then attends to the whole context."""
        cos, sin = rotary
        kv_c, k_pe = torch.split(self.kv_a_proj_with_mqa(hidden), [self.kv_lora_rank, self.rope_dim], dim=-1)
        kv_cache.write(layer, slot_mapping, self.kv_a_layernorm(kv_c), apply_rotary(k_pe, cos, sin))

        q = self._queries(hidden).view(-1, self.num_heads, self.nope_dim + self.rope_dim)  # [T, N, P + O]
        q_nope, q_pe = torch.split(q, [self.nope_dim, self.rope_dim], dim=-1)
        q_pe = apply_rotary(q_pe, cos[:, None], sin[:, None])

        out = q.new_empty((q.shape[0], self.num_heads, self.v_dim))  # [T, N, V]
        for group in plan.decodes:
            latents = kv_cache.gather(layer, group.slots)  # [D, L, R + O]
            out[group.rows] = self._absorbed(q_nope[group.rows], q_pe[group.rows], latents, group)
        for span in plan.prefills:
            latents = kv_cache.gather(layer, span.slots)  # [C, R + O]
            tokens = slice(span.start, span.stop)
            self._expanded(q_nope[tokens], q_pe[tokens], latents, span, out[tokens])
        projected: torch.Tensor = self.o_proj(out.flatten(1))
        return projected

    def _queries(self, hidden: torch.Tensor) -> torch.Tensor:
        """[T, N * (P + O)]."""
        queries: torch.Tensor = (
            self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden))) if self.q_lora else self.q_proj(hidden)
        )
        return queries

    def _up_projections(self) -> tuple[torch.Tensor, torch.Tensor]:
        """W_UK [N, P, R] and W_UV [N, V, R]: views of kv_b_proj, whose rows are [P | V] head after head."""
        per_head = self.kv_b_proj.weight.view(self.num_heads, self.nope_dim + self.v_dim, self.kv_lora_rank)
        return per_head[:, : self.nope_dim], per_head[:, self.nope_dim :]

    def _absorbed(
        self, q_nope: torch.Tensor, q_pe: torch.Tensor, latents: torch.Tensor, group: DecodeGroup
    ) -> torch.Tensor:
        """[D, N, V]: every head queries the same latents, so heads are the rows of one product per sequence."""
        w_uk, w_uv = self._up_projections()
        q_latent = torch.bmm(q_nope.transpose(0, 1), w_uk).transpose(0, 1)  # [D, N, R]
        queries = torch.cat((q_latent, q_pe), dim=-1)  # [D, N, R + O]
        scores = torch.bmm(queries, latents.transpose(1, 2)).float() * self.scale  # [D, N, L]
        scores.masked_fill_(group.padding[:, None], float("-inf"))
        probabilities = scores.softmax(dim=-1).to(latents.dtype)
        mixed = torch.bmm(probabilities, latents[..., : self.kv_lora_rank])  # [D, N, R]
        return torch.bmm(mixed.transpose(0, 1), w_uv.transpose(1, 2)).transpose(0, 1)

    def _expanded(
        self, q_nope: torch.Tensor, q_pe: torch.Tensor, latents: torch.Tensor, span: PrefillSpan, out: torch.Tensor
    ) -> None:
        """Writes [Q, N, V] into out, a few heads at a time when the context is long."""
        kv_c, k_pe = torch.split(latents, [self.kv_lora_rank, self.rope_dim], dim=-1)
        w_uk, w_uv = self._up_projections()
        per_head = latents.shape[0] * (2 * self.nope_dim + self.rope_dim + 2 * self.v_dim)
        step = max(1, min(self.num_heads, _EXPANDED_ELEMENTS_LIMIT // per_head))
        for first in range(0, self.num_heads, step):
            heads = slice(first, first + step)
            k_nope = torch.matmul(kv_c, w_uk[heads].transpose(1, 2))  # [n, C, P]
            value = torch.matmul(kv_c, w_uv[heads].transpose(1, 2))  # [n, C, V]
            key = torch.cat((k_nope, k_pe.expand(k_nope.shape[0], -1, -1)), dim=-1)  # [n, C, P + O]
            query = torch.cat((q_nope[:, heads], q_pe[:, heads]), dim=-1).transpose(0, 1)  # [n, Q, P + O]
            out[:, heads] = self._attend(query, key, value, span.visible).transpose(0, 1)

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visible: torch.Tensor | None
    ) -> torch.Tensor:
        """[n, Q, V]. Values are widened to the keys' width: the fused kernels, which never hold [n, Q, C], ask it."""
        widened = F.pad(value, (0, max(0, key.shape[-1] - value.shape[-1])))
        attended = F.scaled_dot_product_attention(
            query[None], key[None], widened[None], attn_mask=visible, is_causal=visible is None, scale=self.scale
        )
        return attended[0, ..., : self.v_dim]
