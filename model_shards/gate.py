"""Which experts a token visits, and with what weight (DeepSeek-V2, section 2.2; MoEGate of the published code).

Shapes: T tokens, E routed experts, G groups of E / G neighbouring experts, K experts per token.

Departure from transformers, which ignores `norm_topk_prob`: the published gate divides by the sum of the chosen
scores when it is set (and K > 1), and multiplies by `routed_scaling_factor` only when it is not.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from model_shards.config import ModelConfig
from model_shards.linear import frozen_parameter


@dataclass(frozen=True)
class Routing:
    """The gate's answer for T tokens."""

    topk_ids: torch.Tensor  # [T, K] int64, logical experts
    topk_weights: torch.Tensor  # [T, K] float32


class Gate(nn.Module):
    """Softmax router. Its weight stays in float32 whatever the model's dtype: near ties decide who computes."""

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        super().__init__()
        assert config.n_routed_experts is not None, "a gate belongs to a layer with routed experts"
        self.weight = frozen_parameter((config.n_routed_experts, config.hidden_size), torch.float32, device)
        self.top_k = config.num_experts_per_tok
        self.num_groups = config.n_group if config.topk_method == "group_limited_greedy" else 1
        self.topk_group = config.topk_group
        self.normalise = config.norm_topk_prob and self.top_k > 1
        self.routed_scaling_factor = config.routed_scaling_factor

    def forward(self, hidden: torch.Tensor) -> Routing:
        """Routes hidden [T, H]; the order of a token's experts is unspecified."""
        scores = F.linear(hidden.float(), self.weight).softmax(dim=-1)  # [T, E]
        if self.num_groups > 1:
            scores = self._keep_best_groups(scores)
        topk_weights, topk_ids = scores.topk(self.top_k, dim=-1, sorted=False)
        if self.normalise:
            topk_weights = topk_weights / (topk_weights.sum(dim=-1, keepdim=True) + 1e-20)
        else:
            topk_weights = topk_weights * self.routed_scaling_factor
        return Routing(topk_ids, topk_weights)

    def _keep_best_groups(self, scores: torch.Tensor) -> torch.Tensor:
        """Lowers below every score the experts outside the topk_group groups with the best single expert."""
        grouped = scores.view(scores.shape[0], self.num_groups, scores.shape[1] // self.num_groups)  # [T, G, E / G]
        best = grouped.amax(dim=-1).topk(self.topk_group, dim=-1, sorted=False).indices  # [T, topk_group]
        dropped = torch.ones(grouped.shape[:-1], dtype=torch.bool, device=scores.device).scatter(1, best, False)
        # Below zero and not zero: a kept score that underflowed to zero must still win over a dropped expert,
        # or a token could visit more shards than topk_group allows.
        return grouped.masked_fill(dropped.unsqueeze(-1), -1.0).flatten(-2)
