"""The three balance losses of DeepSeek-V2's router (report section 2.2.3, equations 23 to 31).

Shapes: B sequences, S positions, T positions of a sequence that are not padding, E routed experts (N_r in the paper),
K chosen for each token (K_r), D devices: the gate's groups of experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.hooks import RemovableHandle


@dataclass(frozen=True)
class BalanceFactors:
    """Weights of the losses: alpha_1 to alpha_3. The defaults are the paper's."""

    expert: float = 0.003
    device: float = 0.05
    communication: float = 0.02


@dataclass(frozen=True)
class DeviceLayout:
    """Experts of a layer on devices: equal runs in order, as the groups of the gate."""

    num_devices: int  # D
    max_devices_per_token: int  # M


@dataclass(frozen=True)
class BalanceLosses:
    """Scalars with gradient. A router in perfect balance makes each of them its factor, for each MoE layer."""

    expert: torch.Tensor
    device: torch.Tensor
    communication: torch.Tensor

    @property
    def total(self) -> torch.Tensor:
        """What is added to the loss of the language model."""
        return self.expert + self.device + self.communication


@dataclass(frozen=True)
class RouterRecord:
    """What one MoE layer's gate did with one batch."""

    scores: torch.Tensor  # [B, S, E] softmax over all experts, float32, with gradient
    topk_ids: torch.Tensor  # [B, S, K] chosen experts


def balance_losses(
    scores: torch.Tensor,
    topk_ids: torch.Tensor,
    mask: torch.Tensor,
    layout: DeviceLayout,
    factors: BalanceFactors,
) -> BalanceLosses:
    """Losses of one layer: scores [B, S, E], topk_ids [B, S, K], mask [B, S]; mean over sequences that have a token."""
    num_experts, num_chosen = scores.shape[-1], topk_ids.shape[-1]
    tokens = mask.sum(1, keepdim=True).clamp(min=1).to(scores.dtype)  # [B, 1]
    real = mask.unsqueeze(-1).to(scores.dtype)  # [B, S, 1]
    chosen = torch.zeros_like(scores, requires_grad=False).scatter(-1, topk_ids, 1.0) * real  # [B, S, E]

    by_device = (layout.num_devices, num_experts // layout.num_devices)
    batch, positions = mask.shape
    probability = (scores * real).sum(1) / tokens  # P [B, E]
    device_probability = probability.view(batch, *by_device).sum(-1)  # P' = P'' [B, D]
    load = chosen.sum(1) * num_experts / (num_chosen * tokens)  # f [B, E]
    device_load = load.view(batch, *by_device).mean(-1)  # f' [B, D]
    sent = chosen.view(batch, positions, *by_device).amax(-1)  # [B, S, D] 1 where a token goes to a device
    device_traffic = sent.sum(1) * layout.num_devices / (layout.max_devices_per_token * tokens)  # f'' [B, D]

    num_sequences = mask.any(1).sum().clamp(min=1)
    return BalanceLosses(
        expert=factors.expert * (load * probability).sum() / num_sequences,
        device=factors.device * (device_load * device_probability).sum() / num_sequences,
        communication=factors.communication * (device_traffic * device_probability).sum() / num_sequences,
    )


def sum_over_layers(
    records: Sequence[RouterRecord], mask: torch.Tensor, layout: DeviceLayout, factors: BalanceFactors
) -> BalanceLosses:
    """Losses of all MoE layers together; zero where there is none."""
    layers = [balance_losses(record.scores, record.topk_ids, mask, layout, factors) for record in records]
    zero = torch.zeros((), device=mask.device)
    return BalanceLosses(
        expert=sum((layer.expert for layer in layers), zero),
        device=sum((layer.device for layer in layers), zero),
        communication=sum((layer.communication for layer in layers), zero),
    )


def expert_counts(record: RouterRecord, mask: torch.Tensor) -> torch.Tensor:
    """How many tokens chose each expert: [E] int64, padding left out."""
    return torch.bincount(record.topk_ids[mask].flatten(), minlength=record.scores.shape[-1])


class RouterProbe:
    """While entered, collects what the gates of a transformers model do, in the order of the layers.

    The scores are computed again from the gate's input: what a gate returns differs between transformers' versions,
    and no version returns the softmax over all experts.
    """

    def __init__(self, model: nn.Module) -> None:
        self._gates = [module for name, module in model.named_modules() if name.endswith(".mlp.gate")]
        self._handles: list[RemovableHandle] = []
        self._records: list[RouterRecord] = []

    def __enter__(self) -> "RouterProbe":
        self._handles = [gate.register_forward_hook(self._collect) for gate in self._gates]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._records = []

    def take(self) -> list[RouterRecord]:
        """Records since the last call, one for each MoE layer and forward; the caller owns them."""
        records, self._records = self._records, []
        return records

    def _collect(self, gate: nn.Module, inputs: tuple[torch.Tensor], outputs: tuple[torch.Tensor, ...]) -> None:
        hidden = inputs[0]  # [B, S, H]
        weight = gate.weight
        assert isinstance(weight, torch.Tensor)
        with torch.autocast(hidden.device.type, enabled=False):
            scores = F.linear(hidden.float(), weight.float()).softmax(-1)  # [B, S, E]
        self._records.append(RouterRecord(scores, outputs[-1].view(*hidden.shape[:-1], -1)))
