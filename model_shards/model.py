"""DeepSeek-V2 without its routed experts: everything that an attention rank computes.

Shapes: T tokens of one micro-batch, H hidden size, R rows of logits wanted, V vocabulary.

The module tree mirrors Hugging Face's, so parameter names are checkpoint names. Parameters ask for no gradient,
hence nothing here records a graph and no grad mode need be entered, which a generator could not do safely: a mode
is the thread's, and two interleaved generators would leave each other's. A caller may run them under
torch.inference_mode() if the cache is only ever written under it.
"""

from collections.abc import Generator, Iterator

import torch
import torch.nn.functional as F
from torch import nn

from model_shards.attention_plan import plan_attention
from model_shards.batch import AttentionBatch
from model_shards.compiled.layer import pack_layer, serves
from model_shards.compiled.layers import CompiledLayers
from model_shards.config import ModelConfig
from model_shards.errors import CheckpointError
from model_shards.kv_cache import LatentKVCache
from model_shards.linear import FrozenLinear, frozen_parameter
from model_shards.mla import MultiHeadLatentAttention
from model_shards.mlp import MLP
from model_shards.moe import MoE
from model_shards.norm import RMSNorm
from model_shards.packing import has_int8_products, program_instructions
from model_shards.rope import RotaryEmbedding
from model_shards.routed import RoutedExperts


class DecoderLayer(nn.Module):
    """Attention, then a dense MLP or experts; both behind a norm and added to the residual."""

    def __init__(self, config: ModelConfig, layer: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.self_attn = MultiHeadLatentAttention(config, dtype, device)
        self.mlp: MoE | MLP = (
            MoE(config, dtype, device)
            if config.is_moe_layer(layer)
            else MLP(config.hidden_size, config.intermediate_size, dtype, device)
        )
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype, device)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype, device)


class TokenEmbedding(nn.Module):
    """One row of H per token id."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = frozen_parameter((config.vocab_size, config.hidden_size), dtype, device)

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[T] int64 -> [T, H]."""
        return F.embedding(token_ids, self.weight)


class DecoderStack(nn.Module):
    """What Hugging Face names `model`: embedding, layers, last norm."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.embed_tokens = TokenEmbedding(config, dtype, device)
        self.decoder_layers = [DecoderLayer(config, i, dtype, device) for i in range(config.num_hidden_layers)]
        self.layers = nn.ModuleList(self.decoder_layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype, device)
        self.rotary = RotaryEmbedding(config.rope, config.qk_rope_head_dim, device)


class AttentionModel(nn.Module):
    """The attention rank's part of the model; parameters are uninitialised until `hf_slices` are filled."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.config = config
        self.model = DecoderStack(config, dtype, device)
        self._compiled: CompiledLayers | None = None
        self.lm_head: FrozenLinear | None = None
        if not config.tie_word_embeddings:
            self.lm_head = FrozenLinear(config.hidden_size, config.vocab_size, dtype, device)

    def forward_steps(
        self, batch: AttentionBatch, kv_cache: LatentKVCache, routed: RoutedExperts
    ) -> Generator[None, None, torch.Tensor]:
        """Computes one micro-batch, yielding once per MoE layer while its tokens are away.

        Writes the tokens' latents into `kv_cache`; running the same batch again writes the same values. Dispatches
        [0, H] at every MoE layer when the batch is empty. Returns logits [R, V] float32. Raises EpochAbortedError
        as `PendingCombine.wait` does.
        """
        plan = plan_attention(batch, kv_cache.block_size)
        rotary: torch.Tensor = self.model.rotary(batch.positions)
        hidden: torch.Tensor = self.model.embed_tokens(batch.token_ids)  # [T, H]
        if self._compiled is not None:
            normed = yield from self._compiled.steps(batch, hidden, rotary, plan, kv_cache, routed)
            return self._logits(normed[batch.logits_indices])
        for index, layer in enumerate(self.model.decoder_layers):
            normed = layer.input_layernorm(hidden)
            hidden = hidden + layer.self_attn(index, normed, rotary, batch.slot_mapping, plan, kv_cache)
            normed = layer.post_attention_layernorm(hidden)
            if isinstance(layer.mlp, MoE):
                away = layer.mlp.dispatch(index, normed, routed)
                yield
                hidden = hidden + away.wait()
            else:
                hidden = hidden + layer.mlp(normed)
        return self._logits(self.model.norm(hidden[batch.logits_indices]))

    def hf_slices(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(Hugging Face tensor name, writable tensor) for every tensor of an attention rank.

        The gate's weight is float32 whatever the dtype; a tied `lm_head` has no tensor of its own.
        """
        for name, parameter in self.named_parameters():
            yield name, parameter.data

    def lay_out(self, in_int8: bool = False) -> None:
        """Lays the matrices out for this device, once, after they were filled; `hf_slices` is of no use then.

        `in_int8`: those of attention, dense layers and shared experts in 8 bits (model_shards.quantization), and that
        of the logits where there are products of 8 bits: elsewhere all of it would be widened in each step. What is
        none of these: W_UK, W_UV, gates and embedding, from which a model without `lm_head` has its logits. Raises
        CheckpointError for one that cannot be quantized.
        """
        try:
            self._lay_out(in_int8)
        except ValueError as error:
            # What was laid out before it has no elements any more.
            name = next((name for name, view in self.hf_slices() if not bool(view.isfinite().all())), None)
            if name is None:
                raise
            raise CheckpointError(
                f"tensor {name} cannot be quantized: {error}; serve it with engine.attention_weights auto"
            ) from error

    def _lay_out(self, in_int8: bool) -> None:
        self._compiled = self._compile(in_int8)
        if self._compiled is None:
            for layer in self.model.decoder_layers:
                layer.self_attn.lay_out_up_projections()
        for name, module in self.named_modules():
            # Attention took W_UK and W_UV apart, and programs all but the logits' matrix.
            taken = name.endswith("kv_b_proj") if self._compiled is None else name != "lm_head"
            if not isinstance(module, FrozenLinear) or taken:
                continue
            if in_int8 and (name != "lm_head" or has_int8_products(module.weight.dtype, module.weight.device)):
                module.lay_out_int8()
            else:
                module.lay_out()

    def _compile(self, in_int8: bool) -> CompiledLayers | None:
        """The layers as programs, which take their matrices over; None where there are none for them."""
        weight = self.model.embed_tokens.weight
        instructions = program_instructions(weight.dtype, weight.device)
        int8_instructions = program_instructions(torch.int8, weight.device) if in_int8 else None
        if instructions is None or not serves(self.config, instructions) or in_int8 != (int8_instructions is not None):
            return None
        layers = [
            pack_layer(
                self.config,
                layer.input_layernorm,
                layer.self_attn,
                layer.post_attention_layernorm,
                layer.mlp,
                instructions,
                int8_instructions,
            )
            for layer in self.model.decoder_layers
        ]
        return CompiledLayers(self.config, layers, self.model.norm)

    @property
    def is_compiled(self) -> bool:
        """Whether the layers are programs."""
        return self._compiled is not None

    def share_cores(self, shares: bool) -> None:
        """Whether the routed experts compute on the cores that this rank does: programs then compute shared experts
        before the dispatch, with all threads. Modules compute them meanwhile (`limit_meanwhile`)."""
        if self._compiled is not None:
            self._compiled.shares_cores = shares

    def limit_meanwhile(self, num_threads: int) -> None:
        """On a CPU, computes what modules compute while their tokens are away with at most so many threads."""
        for layer in self.model.decoder_layers:
            if isinstance(layer.mlp, MoE):
                layer.mlp.meanwhile_threads = num_threads

    def _logits(self, normed: torch.Tensor) -> torch.Tensor:
        """[R, H], behind the last norm -> [R, V] float32."""
        if self.lm_head is None:
            return F.linear(normed, self.model.embed_tokens.weight).float()
        return self.lm_head.product(normed).float()
