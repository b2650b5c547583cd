"""A layer of shared and routed experts, seen from the attention side: the routed ones are elsewhere."""

from dataclasses import dataclass

import torch
from torch import nn

from model_shards.config import ModelConfig
from model_shards.gate import Gate, Routing
from model_shards.mlp import MLP
from model_shards.routed import PendingCombine, RoutedExperts
from model_shards.threads import at_most


@dataclass(frozen=True)
class PendingMoE:
    """A layer's tokens while they are away, and what was computed here meanwhile."""

    pending: PendingCombine
    shared: torch.Tensor | None  # [T, H]; None without shared experts

    def wait(self) -> torch.Tensor:
        """[T, H], routed plus shared. Raises EpochAbortedError as `PendingCombine.wait` does."""
        routed = self.pending.wait()
        return routed if self.shared is None else routed + self.shared


class MoE(nn.Module):
    """Gate and shared experts of one layer."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.gate = Gate(config, device)
        self.meanwhile_threads: int | None = None  # most threads on a CPU while the routed experts compute
        self.shared_experts: MLP | None = None
        if config.n_shared_experts is not None:
            width = config.moe_intermediate_size * config.n_shared_experts
            self.shared_experts = MLP(config.hidden_size, width, dtype, device)

    def dispatch(self, layer: int, hidden: torch.Tensor, routed: RoutedExperts) -> PendingMoE:
        """Sends hidden [T, H] away, then computes the shared experts while it travels."""
        routing: Routing = self.gate(hidden)
        pending = routed.dispatch(layer, hidden, routing.topk_ids, routing.topk_weights)
        with at_most(self.meanwhile_threads):
            return PendingMoE(pending, None if self.shared_experts is None else self.shared_experts(hidden))
