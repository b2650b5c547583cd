"""What a long prompt's logits must be at a few positions: those rows alone, against the whole context, in float64.

For a sampled position every step of its own row is computed here, by plain softmax over keys and values expanded from
the latents of the tokens before it. The latents of the first layer are computed here too, for all tokens; those of
later layers are taken from the cache, where they are compared with this reference's own at the sampled positions.

Shapes: C tokens of the prompt, S sampled positions, N heads, H hidden size, R kv_lora_rank, P qk_nope_head_dim,
O qk_rope_head_dim, V v_head_dim.
"""

from dataclasses import dataclass

import torch

from model_shards.kv_cache import LatentKVCache
from model_shards.mla import MultiHeadLatentAttention
from model_shards.model import AttentionModel
from model_shards.moe import MoE
from model_shards.rope import attention_scale
from model_shards.routed import RoutedExperts


@dataclass(frozen=True)
class Reference:
    """Of the sampled positions."""

    logits: torch.Tensor  # [S, vocabulary]
    latent_error: float  # largest relative error of a cached row: all of the first layer, the sampled ones of others


@torch.no_grad()
def sampled_reference(
    model: AttentionModel,
    routed: RoutedExperts,
    token_ids: torch.Tensor,  # [C]
    sampled: torch.Tensor,  # [S]
    kv_cache: LatentKVCache,
    slots: torch.Tensor,  # [C], where each token's latents are
) -> Reference:
    """The model must be of float32; its experts, norms and projections are used, its attention is not."""
    positions = torch.arange(token_ids.shape[0])
    angles = positions.float()[:, None] * model.model.rotary.inv_freq  # float32, as the published code has them
    turn = torch.polar(torch.full_like(angles, model.model.rotary.amplitude, dtype=torch.float64), angles.double())
    hidden = model.model.embed_tokens(token_ids[sampled])  # [S, H]
    error = 0.0
    for index, layer in enumerate(model.model.decoder_layers):
        cached = kv_cache.gather(index, slots).double()  # [C, R + O]
        attention = layer.self_attn
        if index == 0:
            everything = layer.input_layernorm(model.model.embed_tokens(token_ids))
            error = max(error, _row_error(cached, _latents(attention, everything, turn)))
        normed = layer.input_layernorm(hidden)
        error = max(error, _row_error(cached[sampled], _latents(attention, normed, turn[sampled])))
        hidden = hidden + _attend(attention, normed, sampled, cached, turn, attention_scale(model.config))
        normed = layer.post_attention_layernorm(hidden)
        if isinstance(layer.mlp, MoE):
            hidden = hidden + layer.mlp.dispatch(index, normed, routed).wait()
        else:
            hidden = hidden + layer.mlp(normed)
    head = model.model.embed_tokens.weight if model.lm_head is None else model.lm_head.weight
    return Reference(model.model.norm(hidden) @ head.T, error)


def _latents(attention: MultiHeadLatentAttention, normed: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """[., R + O] float64 of rows that are normed for the layer."""
    kv_c, k_pe = attention.kv_a_proj_with_mqa(normed).split([attention.kv_lora_rank, attention.rope_dim], dim=-1)
    return torch.cat((attention.kv_a_layernorm(kv_c).double(), _turned(k_pe, turn)), dim=-1)


def _turned(x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """Pairs (2i, 2i + 1) as complex numbers, in float64."""
    pairs = torch.complex(x[..., 0::2].double(), x[..., 1::2].double()) * turn
    return torch.view_as_real(pairs).flatten(-2)


def _attend(
    attention: MultiHeadLatentAttention,
    normed: torch.Tensor,  # [S, H]
    sampled: torch.Tensor,
    cached: torch.Tensor,  # [C, R + O] float64
    turn: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """[S, H]: for each head keys and values of the whole context, and one row of scores for each position."""
    if attention.q_lora:
        q = attention.q_b_proj(attention.q_a_layernorm(attention.q_a_proj(normed)))
    else:
        q = attention.q_proj(normed)
    q = q.view(sampled.shape[0], attention.num_heads, -1).double()  # [S, N, P + O]
    q_nope, q_pe = q[..., : attention.nope_dim], _turned(q[..., attention.nope_dim :], turn[sampled][:, None])
    kv_b = attention.kv_b_proj.weight.double().view(attention.num_heads, -1, attention.kv_lora_rank)
    kv_c, k_pe = cached[:, : attention.kv_lora_rank], cached[:, attention.kv_lora_rank :]
    later = torch.arange(cached.shape[0])[None] > sampled[:, None]  # [S, C]
    heads = []
    for head in range(attention.num_heads):
        k_nope = kv_c @ kv_b[head, : attention.nope_dim].T  # [C, P]
        value = kv_c @ kv_b[head, attention.nope_dim :].T  # [C, V]
        scores = (q_nope[:, head] @ k_nope.T + q_pe[:, head] @ k_pe.T) * scale  # [S, C]
        heads.append(scores.masked_fill(later, float("-inf")).softmax(-1) @ value)  # [S, V]
    projected: torch.Tensor = attention.o_proj(torch.cat(heads, dim=-1).float())
    return projected


def _row_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest over the rows of the norm of the difference over the norm."""
    return float(((actual - expected).norm(dim=-1) / expected.norm(dim=-1)).max())
