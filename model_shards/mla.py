"""Multi-head latent attention (DeepSeek-V2, section 2.1) over the paged latent cache.

Shapes: T tokens, N heads, H hidden size, R kv_lora_rank, P qk_nope_head_dim, O qk_rope_head_dim, V v_head_dim.

The same numbers two ways (appendix C):
    expanded   k = [W_UK c | k_pe], v = W_UV c        many queries share the cost of expanding the context
    absorbed   q.k = (W_UK^T q_nope).c + q_pe.k_pe    one query reads the latents as they lie, all heads at once

Here are the projections around it; `model_shards.attention_core` says who attends.
"""

import torch
from torch import nn

from model_shards.attention_core import choose_core
from model_shards.attention_plan import AttentionPlan
from model_shards.config import ModelConfig
from model_shards.kv_cache import LatentKVCache
from model_shards.linear import FrozenLinear, release
from model_shards.norm import LATENT_NORM_EPS, RMSNorm
from model_shards.rope import apply_rotary
from model_shards.up_projection import UpProjections


class MultiHeadLatentAttention(nn.Module):
    """One layer's attention; parameter names are Hugging Face's."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.kv_lora_rank = config.kv_lora_rank
        self.nope_dim = config.qk_nope_head_dim
        self.rope_dim = config.qk_rope_head_dim
        self.v_dim = config.v_head_dim
        self._core = choose_core(config, device)
        self._up: UpProjections | None = None
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

    def lay_out_up_projections(self) -> None:
        """Lays W_UK and W_UV out for all steps to come, once, after the weights were filled.

        `kv_b_proj` has no elements afterwards. Before, each call makes the layout for itself.
        """
        self._up = self._core.lay_out(self.kv_b_proj.weight.data)
        release(self.kv_b_proj.weight)

    def forward(
        self,
        layer: int,
        hidden: torch.Tensor,  # [T, H]
        rotary: torch.Tensor,  # [T, O / 2] complex64
        slot_mapping: torch.Tensor,  # [T] int64
        plan: AttentionPlan,
        kv_cache: LatentKVCache,
    ) -> torch.Tensor:
        """[T, H]. Writes the tokens' latents into the cache first, then attends to the whole context."""
        kv_c, k_pe = torch.split(self.kv_a_proj_with_mqa(hidden), [self.kv_lora_rank, self.rope_dim], dim=-1)
        kv_cache.write(layer, slot_mapping, self.kv_a_layernorm(kv_c), apply_rotary(k_pe, rotary))

        q = self._core.queries(self._queries(hidden))  # [T, N, P + O]
        q_pe = q[..., self.nope_dim :]
        q_pe.copy_(apply_rotary(q_pe, rotary[:, None]))
        up = self._core.lay_out(self.kv_b_proj.weight) if self._up is None else self._up
        out = self._core.attend(layer, q, plan, kv_cache, up)  # [T, N, V]
        projected: torch.Tensor = self.o_proj(out.flatten(1).to(hidden.dtype))
        return projected

    def _queries(self, hidden: torch.Tensor) -> torch.Tensor:
        """[T, N * (P + O)], not narrower than hidden."""
        queries: torch.Tensor = (
            self.q_b_proj.product(self.q_a_layernorm(self.q_a_proj(hidden)))
            if self.q_lora
            else self.q_proj.product(hidden)
        )
        return queries
