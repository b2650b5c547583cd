"""One micro-batch on its way through the layers: the memory it is computed in, and the programs that compute it.

    enter    norm -> queries, latents into the cache                     of layer l
    attend   absorb -> decode -> value                                   of decodes
    leave    output projection, added to the residual -> norm -> gate
    mlp      gate and up -> SwiGLU -> down                               dense, or shared experts

Shapes: T tokens, D decodes, the rest as in `model_shards.compiled.layer`.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from model_shards.attention_plan import AttentionPlan
from model_shards.batch import AttentionBatch
from model_shards.compiled.layer import LayerWeights
from model_shards.config import ModelConfig
from model_shards.kernels import decode_parts, quantized_latents, rows
from model_shards.kernels.arena import Arena, Array
from model_shards.kernels.builder import Kind
from model_shards.kernels.decode_attention import (
    cache_arguments,
    can_decode,
    decode_code,
    new_slots,
    quantized_row,
    table_arguments,
)
from model_shards.kernels.grouped_product import Rows
from model_shards.kernels.program import Call, Program, float_bits
from model_shards.kernels.routing import CHOICE_ARGUMENTS, SCORES_ARGUMENTS, choose_experts, gate_scores
from model_shards.kv_cache import LatentKVCache
from model_shards.norm import RMSNorm
from model_shards.packing import Packed, PackedInt8, product_call
from model_shards.rope import attention_scale


@dataclass(frozen=True)
class _Programs:
    """Of one layer. `whole` is enter, attend and leave in one call, `all` is that and mlp."""

    enter: Program
    attend: Program
    leave: Program
    whole: Program
    all: Program
    mlp: Program
    residual: Call  # what adds the layer before to the residual: of `enter`
    decode: Call  # of `attend`


class Lane:
    """Memory and programs; for one micro-batch at a time, whose size may change."""

    def __init__(self, config: ModelConfig, layers: Sequence[LayerWeights], last_norm: RMSNorm) -> None:
        self._config = config
        self._layers = layers
        self._last_norm = last_norm
        self._scale = attention_scale(config)
        self._cache: LatentKVCache | None = None
        self.writes_cache = False  # whether `enter` does, and `attend` reads it
        heads = config.num_attention_heads
        head_dim = config.qk_nope_head_dim + config.qk_rope_head_dim
        widths = [_outputs(layer.gate_up) for layer in layers]
        self._quantized = isinstance(layers[0].first, PackedInt8)
        # What a product of 8 bits reads, and its scale: written before each of them.
        operand = max(config.hidden_size, config.q_lora_rank or 0, heads * config.v_head_dim, max(widths) // 2)
        self._tokens = Arena(
            {
                "operand": Array(torch.uint8, operand if self._quantized else 0),
                "operand_scales": Array(torch.float32, int(self._quantized)),
                "slots": Array(torch.int64, 1),
                "rotary": Array(torch.float32, config.qk_rope_head_dim),
                "residual": Array(torch.bfloat16, config.hidden_size),
                "normed": Array(torch.bfloat16, config.hidden_size),
                "first": Array(torch.float32, _outputs(layers[0].first)),
                "q_a": Array(torch.bfloat16, config.q_lora_rank or 0),
                "wide_queries": Array(torch.float32, _outputs(layers[0].q_b)),
                "queries": Array(torch.bfloat16, heads * head_dim),
                "attended": Array(torch.bfloat16, heads * config.v_head_dim),
                "delta": Array(torch.float32, _outputs(layers[0].output)),
                "scores": Array(torch.float32, config.n_routed_experts or 0),
                "expert_ids": Array(torch.int64, config.num_experts_per_tok),
                "expert_weights": Array(torch.float32, config.num_experts_per_tok),
                "gate_up": Array(torch.float32, max(widths)),
                "active": Array(torch.bfloat16, 0 if self._quantized else max(widths) // 2),
            }
        )
        latent = Array(torch.bfloat16, heads * config.kv_lora_rank)
        self._decodes = Arena({"latent_queries": latent, "mixed": latent})
        self._slots = new_slots(config.kv_lora_rank, torch.get_num_threads())
        self._counts = (ctypes.c_int64 * (1 + heads))()  # T, and D once for each head
        self._programs: list[_Programs] = []
        self._last: Call | None = None

    # --- a step -------------------------------------------------------------------------------------------------

    def begin(
        self,
        batch: AttentionBatch,
        embedded: torch.Tensor,  # [T, H]
        rotary: torch.Tensor,  # [T, O / 2] complex64
        plan: AttentionPlan,
        kv_cache: LatentKVCache,
    ) -> None:
        """Takes the micro-batch on."""
        tokens, decodes = batch.num_tokens, plan.num_decodes
        moved = self._cache is not kv_cache
        # Should there be no memory, all is built anew next time: a program would have an address of before.
        self._cache = None
        moved |= self._tokens.make_room(tokens)
        moved |= self._decodes.make_room(decodes)
        if moved:
            self.writes_cache = can_decode(kv_cache)
            self._build(kv_cache)
        self._cache = kv_cache
        self._counts[0] = tokens
        for head in range(1, len(self._counts)):
            self._counts[head] = decodes
        self._tokens["slots"][:tokens, 0] = batch.slot_mapping
        self._tokens["rotary"][:tokens] = torch.view_as_real(rotary).flatten(1)
        self._tokens["residual"][:tokens] = embedded
        if decodes:
            tables = table_arguments(plan.block_tables, plan.lengths)
            for programs in self._programs:
                programs.decode.set(**tables)

    def rows(self, name: str) -> torch.Tensor:
        """[T, ...] of what the programs have written; valid until they write it again."""
        return self._tokens[name][: self._counts[0]]

    def add_routed(self, layer: int, routed: torch.Tensor) -> None:
        """[T, H] bfloat16 that `layer` is to add to the residual as it begins; read then."""
        assert routed.dtype is torch.bfloat16, "as the residual is"
        assert routed.is_contiguous(), "rows lie one after another"
        self._residual(layer).set(bfloat_addend=routed.data_ptr())

    def enter(self, layer: int, threads: int) -> None:
        """Adds what the layer before left; norm, queries and, if it does that, latents into the cache."""
        self._programs[layer].enter.run(threads)

    def attend(self, layer: int, threads: int) -> None:
        """Attention of the decodes."""
        self._programs[layer].attend.run(threads)

    def leave(self, layer: int, threads: int) -> None:
        """From `attended` to what the MLP reads, and whom it is sent to."""
        self._programs[layer].leave.run(threads)

    def whole(self, layer: int, threads: int, with_mlp: bool) -> None:
        """`enter`, `attend` and `leave` of a micro-batch of decodes alone, and `mlp`."""
        programs = self._programs[layer]
        (programs.all if with_mlp else programs.whole).run(threads)

    def mlp(self, layer: int, threads: int) -> None:
        """The dense MLP, or the shared experts; the next layer adds it."""
        self._programs[layer].mlp.run(threads)

    def finish(self, threads: int) -> torch.Tensor:
        """[T, H], behind the last norm."""
        self._residual(len(self._layers)).run(threads)
        return self.rows("normed")

    def _residual(self, layer: int) -> Call:
        if layer < len(self._programs):
            return self._programs[layer].residual
        assert self._last is not None, "begun"
        return self._last

    # --- programs -----------------------------------------------------------------------------------------------

    def _build(self, kv_cache: LatentKVCache) -> None:
        """Anew, for where the memory is now."""
        self._programs = [self._layer_programs(index, kv_cache) for index in range(len(self._layers))]
        self._last = self._add_and_norm(self._after(len(self._layers)), self._last_norm)

    def _layer_programs(self, index: int, kv_cache: LatentKVCache) -> _Programs:
        layer = self._layers[index]
        residual = self._add_and_norm(self._after(index), layer.input_norm)
        decode = self._decode_call(index, kv_cache)
        enter = [residual, *self._enter_calls(index, kv_cache)]
        attend = [self._absorb_call(layer), decode, self._value_call(layer)]
        leave = self._leave_calls(layer)
        mlp = self._mlp_calls(layer)
        return _Programs(
            enter=Program(enter),
            attend=Program(attend),
            leave=Program(leave),
            whole=Program([*enter, *attend, *leave]),
            all=Program([*enter, *attend, *leave, *mlp]),
            mlp=Program(mlp),
            residual=residual,
            decode=decode,
        )

    def _after(self, index: int) -> tuple[Kind, ...]:
        """What the layer before `index` leaves to be added."""
        if index == 0:
            return ()
        before = self._layers[index - 1]
        dense = () if before.down is None else (Kind.FLOAT32,)
        return dense if before.gate is None else (*dense, Kind.BFLOAT16)

    def _add_and_norm(self, addends: tuple[Kind, ...], norm: RMSNorm) -> Call:
        return Call(
            rows.residual_norm(addends),
            rows.RESIDUAL_ARGUMENTS,
            rows=self._number(0),
            residual=self._at("residual"),
            float_addend=self._at("delta"),
            float_row=4 * self._tokens["delta"].stride(0),
            bfloat_addend=0,
            weight=norm.weight.data_ptr(),
            eps=float_bits(norm.eps),
            out=self._at("normed"),
            size=self._config.hidden_size,
        )

    def _enter_calls(self, index: int, kv_cache: LatentKVCache) -> list[Call]:
        layer, config = self._layers[index], self._config
        first = self._tokens["first"]
        calls = self._product(layer.first, "normed", "first")
        queries, queries_width = first, config.num_attention_heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
        latents_from = queries_width
        if layer.q_b is not None and layer.q_norm is not None:
            latents_from = layer.q_norm.weight.shape[0]
            calls += [self._q_norm_call(layer.q_norm), *self._product(layer.q_b, "q_a", "wide_queries")]
            queries = self._tokens["wide_queries"]
        if self.writes_cache:
            calls.append(self._latents_call(index, latents_from, kv_cache))
        calls.append(
            Call(
                rows.queries(),
                rows.QUERIES_ARGUMENTS,
                rows=self._number(0),
                x=queries.data_ptr(),
                x_row=4 * queries.stride(0),
                rotary=self._at("rotary"),
                out=self._at("queries"),
                heads=config.num_attention_heads,
                nope=config.qk_nope_head_dim,
                rope=config.qk_rope_head_dim,
            )
        )
        return calls

    def _q_norm_call(self, norm: RMSNorm) -> Call:
        first = self._tokens["first"]
        return Call(
            rows.norm(),
            rows.NORM_ARGUMENTS,
            rows=self._number(0),
            x=first.data_ptr(),
            x_row=4 * first.stride(0),
            weight=norm.weight.data_ptr(),
            eps=float_bits(norm.eps),
            out=self._at("q_a"),
            size=norm.weight.shape[0],
        )

    def _latents_call(self, index: int, column: int, kv_cache: LatentKVCache) -> Call:
        """Of the columns of `first` from `column`."""
        first, norm = self._tokens["first"], self._layers[index].latent_norm
        row = quantized_row(kv_cache)
        return Call(
            rows.latents() if row is None else quantized_latents.latents(row),
            rows.LATENTS_ARGUMENTS,
            rows=self._number(0),
            x=first.data_ptr() + 4 * column,
            x_row=4 * first.stride(0),
            weight=norm.weight.data_ptr(),
            eps=float_bits(norm.eps),
            rotary=self._at("rotary"),
            slots=self._at("slots"),
            cache=kv_cache.layer(index).data_ptr(),
            rank=self._config.kv_lora_rank,
            rope=self._config.qk_rope_head_dim,
        )

    def _absorb_call(self, layer: LayerWeights) -> Call:
        head_dim = self._config.qk_nope_head_dim + self._config.qk_rope_head_dim
        return layer.up.absorbing.call(
            self._by_head(self._tokens["queries"], head_dim),
            self._by_head(self._decodes["latent_queries"], self._config.kv_lora_rank),
            self._number(1),
            narrow=True,
        )

    def _decode_call(self, index: int, kv_cache: LatentKVCache) -> Call:
        config = self._config
        head_dim = config.qk_nope_head_dim + config.qk_rope_head_dim
        return Call(
            decode_code(kv_cache),
            decode_parts.ARGUMENTS,
            sequences=self._number(1),
            latent_queries=self._decodes.address("latent_queries"),
            rope_queries=self._at("queries") + 2 * config.qk_nope_head_dim,
            rope_head=2 * head_dim,
            rope_sequence=2 * self._tokens["queries"].stride(0),
            tables=0,
            table_row=0,
            lengths=0,
            mixed=self._decodes.address("mixed"),
            heads=config.num_attention_heads,
            scale=float_bits(self._scale),
            slots=self._slots.data_ptr(),
            num_slots=self._slots.shape[0],
            **cache_arguments(kv_cache, index),
        )

    def _value_call(self, layer: LayerWeights) -> Call:
        return layer.up.valuing.call(
            self._by_head(self._decodes["mixed"], self._config.kv_lora_rank),
            self._by_head(self._tokens["attended"], self._config.v_head_dim),
            self._number(1),
            narrow=True,
        )

    def _leave_calls(self, layer: LayerWeights) -> list[Call]:
        calls = [
            *self._product(layer.output, "attended", "delta"),
            self._add_and_norm((Kind.FLOAT32,), layer.post_norm),
        ]
        if layer.gate is not None:
            calls += [
                Call(
                    gate_scores(),
                    SCORES_ARGUMENTS,
                    rows=self._number(0),
                    x=self._at("normed"),
                    weight=layer.gate.weight.data_ptr(),
                    out=self._at("scores"),
                    size=self._config.hidden_size,
                    experts=layer.gate.choice.experts,
                ),
                Call(
                    choose_experts(layer.gate.choice),
                    CHOICE_ARGUMENTS,
                    rows=self._number(0),
                    scores=self._at("scores"),
                    ids=self._at("expert_ids"),
                    weights=self._at("expert_weights"),
                ),
            ]
        return calls

    def _mlp_calls(self, layer: LayerWeights) -> list[Call]:
        if layer.gate_up is None or layer.down is None:
            return []
        width = layer.gate_up.num_outputs // 2
        gate_up = self._tokens["gate_up"]
        # Rows as wide as this layer's, which the arena has room for: a layer may be narrower than the widest.
        active = Rows(self._at("operand"), width) if self._quantized else Rows(self._at("active"), 2 * width)
        activate = Call(
            rows.swiglu(self._quantized),
            rows.SWIGLU_ARGUMENTS,
            rows=self._number(0),
            x=gate_up.data_ptr(),
            x_row=4 * gate_up.stride(0),
            out=active.address,
            scales=self._at("operand_scales"),
            size=width,
        )
        down = self._multiply(layer.down, active, "delta")
        return [*self._product(layer.gate_up, "normed", "gate_up"), activate, down]

    def _product(self, weights: Packed, x: str, out: str) -> list[Call]:
        """Of bfloat16 rows; those of 8 bits are made of them first."""
        if not self._quantized:
            return [self._multiply(weights, Rows.of(self._tokens[x]), out)]
        size = self._tokens[x].shape[1]
        quantize = Call(
            rows.quantize(),
            rows.QUANTIZE_ARGUMENTS,
            rows=self._number(0),
            x=self._at(x),
            out=self._at("operand"),
            scales=self._at("operand_scales"),
            size=size,
        )
        return [quantize, self._multiply(weights, Rows(self._at("operand"), size), out)]

    def _multiply(self, weights: Packed, x: Rows, out: str) -> Call:
        return product_call(weights, x, self._tokens["operand_scales"], Rows.of(self._tokens[out]), self._number(0))

    def _by_head(self, array: torch.Tensor, head_dim: int) -> Rows:
        """Rows of [..., N, head_dim] bfloat16, head for head."""
        return Rows(array.data_ptr(), 2 * array.stride(0), matrix=2 * head_dim, apart=False)

    def _at(self, name: str) -> int:
        return self._tokens.address(name)

    def _number(self, index: int) -> int:
        return ctypes.addressof(self._counts) + 8 * index


def _outputs(matrix: Packed | None) -> int:
    return 0 if matrix is None else matrix.padded_outputs
