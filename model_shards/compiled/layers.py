"""All layers of an attention rank as programs (model_shards.compiled.lane), around the exchanges with the experts.

Shapes: T tokens of one micro-batch, H hidden size.
"""

import functools
import weakref
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from model_shards.attention_plan import AttentionPlan
from model_shards.batch import AttentionBatch
from model_shards.blockwise_attention import BlockwiseAttention
from model_shards.compiled.lane import Lane
from model_shards.compiled.layer import LayerWeights, head_shape
from model_shards.config import ModelConfig
from model_shards.kernels.grouped_product import BYTES_OF_A_TEAM
from model_shards.kernels.prefill_attention import PrefillAttention
from model_shards.kv_cache import LatentKVCache
from model_shards.norm import RMSNorm
from model_shards.rope import apply_rotary, attention_scale
from model_shards.routed import RoutedExperts


class CompiledLayers:
    """What `model_shards.model.DecoderStack` computes between the embedding and the logits."""

    def __init__(self, config: ModelConfig, layers: Sequence[LayerWeights], last_norm: RMSNorm) -> None:
        self.shares_cores = False  # whether the routed experts compute on the cores that this rank computes on
        self._config = config
        self._layers = layers
        self._last_norm = last_norm
        self._core = BlockwiseAttention(config)
        self._head_dim = config.qk_nope_head_dim + config.qk_rope_head_dim
        self._prefill = PrefillAttention(
            head_shape(config),
            config.num_attention_heads,
            attention_scale(config),
            layers[0].up.valuing.instructions,
        )
        self._uses_team = layers[0].first.nbytes + layers[0].output.nbytes >= BYTES_OF_A_TEAM
        self._free: list[Lane] = []
        self._cache: weakref.ref[LatentKVCache] | None = None  # what the last micro-batch read

    def steps(
        self,
        batch: AttentionBatch,
        embedded: torch.Tensor,  # [T, H]
        rotary: torch.Tensor,  # [T, O / 2] complex64
        plan: AttentionPlan,
        kv_cache: LatentKVCache,
        routed: RoutedExperts,
    ) -> Generator[None, None, torch.Tensor]:
        """One micro-batch: see `AttentionModel.forward_steps`. Returns [T, H], behind the last norm; a copy."""
        if self._cache is None or self._cache() is not kv_cache:
            # Those that nobody computes in would keep the other one alive.
            self._free.clear()
            self._cache = weakref.ref(kv_cache)
        with self._lane() as lane:
            lane.begin(batch, embedded, rotary, plan, kv_cache)
            # The same tensors for every layer: what sends them away then knows already where they are.
            normed, ids, weights = (lane.rows(name) for name in ("normed", "expert_ids", "expert_weights"))
            threads = self._threads()
            only_decodes = lane.writes_cache and not plan.prefills
            for index, layer in enumerate(self._layers):
                # Where the experts' ranks compute on these cores there is nothing to gain from computing beside them.
                beside = layer.gate is not None and not self.shares_cores
                if only_decodes:
                    lane.whole(index, threads, with_mlp=not beside)
                else:
                    self._attention(lane, index, rotary, batch, plan, kv_cache)
                    if not beside:
                        lane.mlp(index, threads)
                if layer.gate is None:
                    continue
                pending = routed.dispatch(index, normed, ids, weights)
                if beside:
                    lane.mlp(index, threads)
                yield
                summed = pending.wait()  # kept until the next layer has read it
                lane.add_routed(index + 1, summed)
            return lane.finish(threads).clone()

    def _attention(
        self,
        lane: Lane,
        index: int,
        rotary: torch.Tensor,
        batch: AttentionBatch,
        plan: AttentionPlan,
        kv_cache: LatentKVCache,
    ) -> None:
        """From the residual to what the experts read, with prefills or another cache than the programs know."""
        threads = self._threads()
        lane.enter(index, threads)
        if not lane.writes_cache:
            self._write_latents(lane, index, rotary, batch, kv_cache)
        config, layer, decodes = self._config, self._layers[index], plan.num_decodes
        queries = lane.rows("queries").view(-1, config.num_attention_heads, self._head_dim)
        attended = lane.rows("attended").view(-1, config.num_attention_heads, config.v_head_dim)
        if decodes and lane.writes_cache:
            lane.attend(index, threads)
        elif decodes:
            attended[:decodes] = self._core.decode(index, queries[:decodes].float(), plan, kv_cache, layer.up)
        for span in plan.prefills:
            tokens = slice(span.start, span.stop)
            if self._core.absorbing_is_less(span.stop - span.start, span.context):
                attended[tokens] = self._core.absorbed(index, queries[tokens].float(), span, kv_cache, layer.up)
                continue
            latents = functools.partial(_latents, kv_cache, index, span.slots)
            self._prefill.attend(
                queries[tokens], latents, span.context, layer.w_uk, layer.up.valuing, attended[tokens], threads
            )
        lane.leave(index, threads)

    def _write_latents(
        self, lane: Lane, index: int, rotary: torch.Tensor, batch: AttentionBatch, kv_cache: LatentKVCache
    ) -> None:
        """Into a cache that the programs do not know."""
        config, norm = self._config, self._layers[index].latent_norm
        first = lane.rows("first")
        column = self._layers[index].first.num_outputs - config.latent_dim
        kv_c, k_pe = torch.split(
            first[:, column : column + config.latent_dim], [config.kv_lora_rank, config.qk_rope_head_dim], dim=-1
        )
        normed = F.rms_norm(kv_c, norm.weight.shape, norm.weight.float(), norm.eps)
        kv_cache.write(
            index, batch.slot_mapping, normed.to(torch.bfloat16), apply_rotary(k_pe, rotary).to(torch.bfloat16)
        )

    def _threads(self) -> int:
        return torch.get_num_threads() if self._uses_team else 1

    @contextmanager
    def _lane(self) -> Iterator[Lane]:
        """One that nobody computes in."""
        lane = self._free.pop() if self._free else Lane(self._config, self._layers, self._last_norm)
        try:
            yield lane
        finally:
            self._free.append(lane)


def _latents(kv_cache: LatentKVCache, layer: int, slots: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """[stop - start, R + O] of a context."""
    return kv_cache.gather(layer, slots[start:stop])
