"""Dispatch and combine between attention ranks and expert shards. The contract is in docs/dispatch.md."""

import torch

from cluster.dispatch.attention import LockstepAttentionDispatcher
from cluster.dispatch.base import AttentionDispatcher, ExpertCompute, ExpertDispatcher, StepPlan
from cluster.dispatch.expert import LockstepExpertDispatcher
from cluster.dispatch.fence import make_fence
from cluster.dispatch.layout import RowShape
from cluster.dispatch.local import LocalDispatcher
from cluster.dispatch.trace import ExchangeTrace, TracedLink
from cluster.dispatch.transport import DirectTransport, Link, SharedTransport, StagedTransport, Transport
from cluster.membership import Membership
from cluster.process_group import EpochGroups
from model_shards.config import ModelConfig

__all__ = [
    "AttentionDispatcher",
    "ExpertCompute",
    "ExpertDispatcher",
    "LocalDispatcher",
    "StepPlan",
    "make_attention_dispatcher",
    "make_expert_dispatcher",
]


def make_attention_dispatcher(
    groups: EpochGroups,
    membership: Membership,
    attention_rank: int,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    trace: ExchangeTrace | None = None,
) -> AttentionDispatcher:
    """The dispatcher of one attention rank; lives as long as `groups`."""
    topology = membership.topology
    link = _link(groups, membership, topology.attention_global_rank(attention_rank), device, trace)
    shape = _row_shape(config, dtype)
    return LockstepAttentionDispatcher(link, topology, membership.placement, attention_rank, shape, device)


def make_expert_dispatcher(
    groups: EpochGroups,
    membership: Membership,
    ep_rank: int,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    trace: ExchangeTrace | None = None,
) -> ExpertDispatcher:
    """The dispatcher of one expert rank; lives as long as `groups`."""
    topology = membership.topology
    global_rank = topology.expert_global_rank(ep_rank)
    link = _link(groups, membership, global_rank, device, trace)
    fence = make_fence(membership.epoch, device, topology.name(global_rank))
    return LockstepExpertDispatcher(link, topology, config.moe_layers, _row_shape(config, dtype), fence, device)


def _row_shape(config: ModelConfig, dtype: torch.dtype) -> RowShape:
    return RowShape(config.hidden_size, config.num_experts_per_tok, dtype)


def _link(
    groups: EpochGroups,
    membership: Membership,
    global_rank: int,
    device: torch.device,
    trace: ExchangeTrace | None,
) -> Link:
    transport, name = _transport(groups, membership, device), membership.topology.name(global_rank)
    if trace is None:
        return Link(transport, membership.epoch, name)
    return TracedLink(transport, membership.epoch, name, trace)


def _transport(groups: EpochGroups, membership: Membership, device: torch.device) -> Transport:
    if groups.mesh is not None:
        return SharedTransport(groups.mesh, membership.exchange_timeout_s)
    assert groups.data is not None, "an epoch has a mesh or a process group for its data"
    staged = groups.backend == "gloo" and device.type == "cuda"
    return StagedTransport(groups.data) if staged else DirectTransport(groups.data)
