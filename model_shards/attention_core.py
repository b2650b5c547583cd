"""What lies between the queries and the output projection of a layer, and which way of computing it a device gets."""

from typing import Protocol

import torch

from model_shards.attention_plan import AttentionPlan
from model_shards.blockwise_attention import BlockwiseAttention
from model_shards.config import ModelConfig
from model_shards.fused_attention import FusedAttention
from model_shards.kv_cache import LatentKVCache
from model_shards.up_projection import UpProjections


class AttentionCore(Protocol):
    """Attends to the cached latents of one layer."""

    def lay_out(self, kv_b_weight: torch.Tensor) -> UpProjections:
        """The up-projections as `attend` multiplies by them; views of the weight where that is as good as a copy."""
        ...

    def queries(self, projected: torch.Tensor) -> torch.Tensor:
        """[T, N, P + O] in the dtype that is computed in, of [T, N * (P + O)]; may be the same memory."""
        ...

    def attend(
        self, layer: int, queries: torch.Tensor, plan: AttentionPlan, kv_cache: LatentKVCache, up: UpProjections
    ) -> torch.Tensor:
        """[T, N, V] in the dtype of the queries [T, N, P + O], which are rotated; the new tokens are in the cache."""
        ...


def choose_core(config: ModelConfig, device: torch.device) -> AttentionCore:
    """Blocks that fit its caches on a CPU, in float32 but where bfloat16 is compiled for. Fused kernels in the model's
    dtype elsewhere."""
    return BlockwiseAttention(config) if device.type == "cpu" else FusedAttention(config)
