"""The weights of one decoder layer, laid out for its programs.

Shapes: H hidden size, N heads, P qk_nope_head_dim, O qk_rope_head_dim, R kv_lora_rank, Q what q_b_proj reads of a row
(q_lora_rank), or N * (P + O) without it, V v_head_dim, E routed experts, I intermediate size.
"""

from dataclasses import dataclass

import torch

from model_shards.config import ModelConfig
from model_shards.kernels import prefill_attention
from model_shards.kernels.builder import LANES
from model_shards.kernels.grouped_product import PackedMatrices
from model_shards.kernels.instructions import Instructions
from model_shards.kernels.prefill_ir import HeadShape
from model_shards.kernels.routing import Choice
from model_shards.linear import release
from model_shards.mla import MultiHeadLatentAttention
from model_shards.mlp import MLP
from model_shards.moe import MoE
from model_shards.norm import RMSNorm
from model_shards.packing import Packed, PackedInt8
from model_shards.quantization import Quantization, quantize_matrices
from model_shards.up_projection import PackedUpProjections, split_heads


@dataclass(frozen=True)
class GateWeights:
    """Who routes."""

    weight: torch.Tensor  # [E, H] float32
    choice: Choice


@dataclass(frozen=True)
class LayerWeights:
    """One layer's. Vectors are the modules' own and matrices all plain, or all of 8 bits."""

    input_norm: RMSNorm
    first: Packed  # [Q + R + O, H]: the queries' first product, and the latents'
    q_norm: RMSNorm | None  # [Q]
    q_b: Packed | None  # [N * (P + O), Q]
    latent_norm: RMSNorm  # [R]
    up: PackedUpProjections
    w_uk: torch.Tensor  # [N, P, R], as prefills multiply it
    output: Packed  # [H, N * V]
    post_norm: RMSNorm
    gate: GateWeights | None  # None: a dense layer
    gate_up: Packed | None  # [2I, H], of the dense MLP or of the shared experts; None: there are none
    down: Packed | None  # [H, I]


def serves(config: ModelConfig, instructions: Instructions) -> bool:
    """Whether there are programs for a model of this shape."""
    vectors = [config.hidden_size, config.intermediate_size, config.qk_nope_head_dim, config.qk_rope_head_dim]
    if config.q_lora_rank is not None:
        vectors.append(config.q_lora_rank)
    if config.n_routed_experts is not None:
        vectors += [config.n_routed_experts, config.moe_intermediate_size]
    # Heads lie beside each other where they are written, so each is of whole tiles.
    tiles = [config.kv_lora_rank, config.v_head_dim]
    return (
        not config.attention_bias
        and prefill_attention.serves(head_shape(config), instructions)
        and all(size % LANES == 0 for size in vectors)
        and all(size % instructions.width == 0 for size in tiles)
    )


def head_shape(config: ModelConfig) -> HeadShape:
    """Sizes of a head of this model."""
    return HeadShape(config.qk_nope_head_dim, config.qk_rope_head_dim, config.kv_lora_rank, config.v_head_dim)


def pack_layer(
    config: ModelConfig,
    input_norm: RMSNorm,
    attention: MultiHeadLatentAttention,
    post_norm: RMSNorm,
    mlp: MoE | MLP,
    instructions: Instructions,
    int8_instructions: Instructions | None = None,
) -> LayerWeights:
    """Takes the weights of the layer's matrices over, which have no elements afterwards.

    With `int8_instructions` they are quantized to 8 bits, all but W_UK, W_UV and the gate. Raises ValueError for one
    that cannot be, which it leaves as it was.
    """

    def packed(*weights: torch.nn.Parameter) -> Packed:
        parts = [weight.data for weight in weights]
        if int8_instructions is None:
            matrices: Packed = PackedMatrices(torch.cat(parts)[None], instructions)
        else:
            rows = quantize_matrices(parts, Quantization.INT8)
            matrices = PackedInt8(rows.values[None], rows.scale_inv[None], int8_instructions)
        for weight in weights:
            release(weight)
        return matrices

    dense_up = split_heads(attention.kv_b_proj.weight.data, config.num_attention_heads, config.qk_nope_head_dim)
    up = PackedUpProjections(dense_up, instructions, expands=False)
    w_uk = dense_up.w_uk.clone(memory_format=torch.contiguous_format)
    release(attention.kv_b_proj.weight)
    queries = attention.q_a_proj if attention.q_lora else attention.q_proj
    dense = mlp if isinstance(mlp, MLP) else mlp.shared_experts
    return LayerWeights(
        input_norm=input_norm,
        first=packed(queries.weight, attention.kv_a_proj_with_mqa.weight),
        q_norm=attention.q_a_layernorm if attention.q_lora else None,
        q_b=packed(attention.q_b_proj.weight) if attention.q_lora else None,
        latent_norm=attention.kv_a_layernorm,
        up=up,
        w_uk=w_uk,
        output=packed(attention.o_proj.weight),
        post_norm=post_norm,
        gate=_gate(config, mlp) if isinstance(mlp, MoE) else None,
        gate_up=None if dense is None else packed(dense.gate_proj.weight, dense.up_proj.weight),
        down=None if dense is None else packed(dense.down_proj.weight),
    )


def _gate(config: ModelConfig, moe: MoE) -> GateWeights:
    gate = moe.gate
    choice = Choice(
        experts=gate.weight.shape[0],
        groups=gate.num_groups,
        kept_groups=gate.topk_group if gate.num_groups > 1 else 1,
        top_k=gate.top_k,
        normalise=gate.normalise,
        scale=gate.routed_scaling_factor,
    )
    return GateWeights(gate.weight.data, choice)
