"""What one light rank does while it is measured: joins an epoch, exchanges headers and layers, leaves."""

import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.mirror import Mirror
from benchmarks.scaling.pool import private_bytes
from cluster.dispatch import StepPlan, make_attention_dispatcher, make_expert_dispatcher
from cluster.membership import Membership
from cluster.process_group import EpochGroups, open_epoch
from cluster.rendezvous import connect_rendezvous
from cluster.step_header import HeaderExchange, StepHeader
from cluster.topology import Role
from model_shards.config import ModelConfig
from tests.dispatch_cell import CONFIG

_HIDDEN = 256
_TOP_K = 6
_LAYERS = 4
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class RankCost:
    """One rank in one epoch. CPU seconds are of this process, all its threads; wall seconds of its clock."""

    join_cpu_s: float
    join_wall_s: float  # from when all have connected to the store: torch's own connecting may wait for DNS
    private_bytes: int  # of this process, with the epoch open
    descriptors: int  # that the epoch holds open
    header_cpu_s: float  # one exchange of headers
    header_wall_s: float  # the lower quartile
    layer_cpu_s: float  # one layer's exchange, dispatch and combine
    messages: int  # of one layer, that this rank sends
    leave_wall_s: float


@dataclass(frozen=True)
class Load:
    """How often each exchange is made, and how large it is."""

    headers: int
    steps: int
    rows: int  # tokens of one attention rank


def rank_work(membership: Membership, rank: int, load: Load) -> RankCost:
    """Runs one epoch as `rank`."""
    descriptors = _descriptors()
    cpu = time.process_time()
    store = connect_rendezvous(membership.rendezvous, membership.join_timeout_s)
    if store.add("connected", 1) == membership.topology.world_size:
        store.set("all connected", "")
    store.wait(["all connected"])
    wall = time.perf_counter()
    with open_epoch(membership, rank, _CPU, store) as groups:
        join_cpu_s, join_wall_s = time.process_time() - cpu, time.perf_counter() - wall
        memory, descriptors = private_bytes(), _descriptors() - descriptors
        headers = HeaderExchange(groups, membership, rank, 1, _LAYERS)
        header_cpu_s, header_wall_s = _headers(headers, membership, load.headers)
        layer_cpu_s, messages = _layers(groups, headers, membership, rank, load) if load.steps else (0.0, 0)
        headers.exchange(StepHeader(membership.epoch, (0,), ends=True))
        wall = time.perf_counter()
    leave_wall_s = time.perf_counter() - wall
    return RankCost(
        join_cpu_s, join_wall_s, memory, descriptors, header_cpu_s, header_wall_s, layer_cpu_s, messages, leave_wall_s
    )


def _descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def _headers(headers: HeaderExchange, membership: Membership, count: int) -> tuple[float, float]:
    header = StepHeader(membership.epoch, (0,), ends=False)
    headers.exchange(header)
    walls = []
    cpu = time.process_time()
    for _ in range(count):
        begun = time.perf_counter()
        headers.exchange(header)
        walls.append(time.perf_counter() - begun)
    return (time.process_time() - cpu) / count, statistics.quantiles(walls, n=4)[0]


def _config(num_experts: int) -> ModelConfig:
    return replace(
        CONFIG,
        hidden_size=_HIDDEN,
        num_hidden_layers=_LAYERS + CONFIG.first_k_dense_replace,
        n_routed_experts=num_experts,
        num_experts_per_tok=_TOP_K,
    )


def _layers(
    groups: EpochGroups, headers: HeaderExchange, membership: Membership, rank: int, load: Load
) -> tuple[float, int]:
    """CPU seconds and messages of one layer on this rank."""
    assert groups.mesh is not None, "messages are counted where they are sent through shared memory"
    topology, num_experts = membership.topology, membership.placement.num_logical
    config = _config(num_experts)
    plan = StepPlan(membership.epoch, ((load.rows,),) * topology.num_attention)
    header = StepHeader(membership.epoch, (load.rows,), ends=False)
    headers.exchange(header)
    cpu = time.process_time()
    if topology.role(rank) is Role.EXPERT:
        mirror = Mirror(len(config.moe_layers))
        expert = make_expert_dispatcher(groups, membership, rank - topology.num_attention, config, torch.bfloat16, _CPU)
        for _ in range(load.steps):
            expert.run_step(plan, mirror)
    else:
        attention = make_attention_dispatcher(groups, membership, rank, config, torch.bfloat16, _CPU)
        tokens = torch.randn(load.rows, _HIDDEN, dtype=torch.bfloat16)
        ids = torch.stack([torch.randperm(num_experts)[:_TOP_K] for _ in range(load.rows)])
        weights = torch.rand(load.rows, _TOP_K)
        for _ in range(load.steps):
            attention.begin_step(plan)
            routed = attention.routed(0)
            assert routed is not None, "the plan has rows"
            for layer in config.moe_layers:
                routed.dispatch(layer, tokens, ids, weights).wait()
    per_layer = load.steps * len(config.moe_layers)
    return (time.process_time() - cpu) / per_layer, groups.mesh.messages_sent // per_layer
