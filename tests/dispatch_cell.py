"""A cell that only exchanges: no attention, experts that multiply. Its right answers are known in closed form.

Expert e of layer l multiplies a token by (e + 1) * (l + 1), so every wrong row, id, weight or layer shows.
"""

import ctypes
import random
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from functools import partial

import torch

from cluster.dispatch import StepPlan, make_attention_dispatcher, make_expert_dispatcher
from cluster.membership import Membership, Rendezvous
from cluster.process_group import open_epoch
from cluster.rendezvous import connect_rendezvous
from cluster.step_header import HeaderExchange, StepHeader
from cluster.topology import Role, Topology
from model_shards.config import ModelConfig, RopeConfig
from model_shards.kernels.program import Call, Halt, Program
from model_shards.pipeline import run_micro_batches
from model_shards.placement import contiguous_placement
from model_shards.routed import RoutedExperts

NUM_EXPERTS = 10
CONFIG = ModelConfig(
    vocab_size=8,
    hidden_size=16,
    intermediate_size=8,
    moe_intermediate_size=8,
    num_hidden_layers=4,
    num_attention_heads=1,
    q_lora_rank=None,
    kv_lora_rank=4,
    qk_nope_head_dim=4,
    qk_rope_head_dim=4,
    v_head_dim=4,
    n_routed_experts=NUM_EXPERTS,
    n_shared_experts=1,
    num_experts_per_tok=3,
    n_group=1,
    topk_group=1,
    topk_method="greedy",
    routed_scaling_factor=1.0,
    norm_topk_prob=False,
    first_k_dense_replace=1,
    moe_layer_freq=1,
    rms_norm_eps=1e-6,
    max_position_embeddings=64,
    rope=RopeConfig(10000.0, None),
    attention_bias=False,
    tie_word_embeddings=False,
    bos_token_id=None,
    eos_token_ids=(),
)


class FakeShard:
    """The experts of one shard; see the top of the file."""

    def __init__(self, experts: tuple[int, ...]) -> None:
        self._factors = torch.tensor([float(expert + 1) for expert in experts])

    def forward(self, layer: int, hidden: torch.Tensor, local_ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        factors = self._factors.to(hidden.device)[local_ids.clamp(min=0)] * weights
        factors = torch.where(local_ids >= 0, factors, 0.0)
        return (hidden.float() * factors.sum(dim=1, keepdim=True) * (layer + 1)).to(hidden.dtype)

    def prepare(
        self,
        hidden: torch.Tensor,
        local_ids: torch.Tensor,
        weights: torch.Tensor,
        out: torch.Tensor,
        halt: Halt,
    ) -> "PreparedFake | None":
        """Of up to eight rows, so that steps are computed in both ways."""
        return PreparedFake(self, hidden, local_ids, weights, out) if hidden.shape[0] <= 8 else None


class PreparedFake:
    """`FakeShard.forward` as programs, of use once for each layer: then all is as if memory had moved."""

    def __init__(
        self,
        shard: FakeShard,
        hidden: torch.Tensor,
        local_ids: torch.Tensor,
        weights: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        self._left = len(CONFIG.moe_layers)
        self.programs: list[Program] = []
        for layer in CONFIG.moe_layers:

            def compute(layer: int = layer) -> None:
                self._left -= 1
                out.copy_(shard.forward(layer, hidden, local_ids, weights))

            self.programs.append(Program([PythonCall(compute)]))

    @property
    def is_current(self) -> bool:
        """Whether it can be run still."""
        return self._left > 0


class PythonCall(Call):
    """A function without arguments that must not raise, as one call of a program."""

    def __init__(self, function: Callable[[], None]) -> None:
        signature = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
        self._callback = signature(lambda arguments, first, step: function() if first == 0 else None)

    @property
    def share(self) -> int:
        """See `Call`."""
        return ctypes.cast(self._callback, ctypes.c_void_p).value or 0

    @property
    def address(self) -> int:
        """There are no arguments."""
        return 0


def slow_moe(layer: int, hidden: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
    """What all shards together must answer, by a loop over tokens and experts; [T, H] float64."""
    result = torch.zeros(hidden.shape, dtype=torch.float64)
    for token, experts in enumerate(topk_ids.tolist()):
        for k, expert in enumerate(experts):
            factor = float(topk_weights[token, k]) * (expert + 1) * (layer + 1)
            result[token] += factor * hidden[token].cpu().double()
    return result


def membership_of(
    rendezvous: Rendezvous, epoch: int, num_attention: int, num_expert: int, backend: str = "gloo"
) -> Membership:
    """A membership with deadlines that a loaded test machine keeps."""
    topology = Topology(num_attention, num_expert)
    return Membership(epoch, topology, contiguous_placement(NUM_EXPERTS, num_expert), rendezvous, backend, 60.0, 30.0)


def random_plan(membership: Membership, num_micro_batches: int, step: int) -> StepPlan:
    """The same on every rank. Idle replicas, empty micro-batches and, now and then, a step without any token."""
    rng = random.Random(f"{membership.epoch}/{step}")
    if rng.random() < 0.1:
        return StepPlan(membership.epoch, ((0,) * num_micro_batches,) * membership.topology.num_attention)
    empty = rng.randrange(4)  # this micro-batch, if there is one, is empty on every rank
    tokens = tuple(
        tuple(0 if index == empty or rng.random() < 0.3 else rng.randint(1, 20) for index in range(num_micro_batches))
        for _ in range(membership.topology.num_attention)
    )
    return StepPlan(membership.epoch, tokens)


@dataclass(frozen=True)
class RankReport:
    """What one rank did in one epoch."""

    epoch: int
    global_rank: int
    rows: tuple[int, ...]  # attention: sent to each shard; expert: received
    checked: int  # tokens whose sum was compared with the slow reference


def run_rank_epoch(
    membership: Membership,
    global_rank: int,
    num_micro_batches: int,
    num_steps: int,
    dtype: torch.dtype,
    device_name: str,
) -> RankReport:
    """Joins an epoch, exchanges random steps, checks every answer, leaves."""
    device = torch.device(device_name)
    topology, epoch = membership.topology, membership.epoch
    store = connect_rendezvous(membership.rendezvous, membership.join_timeout_s)
    plans = [random_plan(membership, num_micro_batches, step) for step in range(num_steps)]
    with open_epoch(membership, global_rank, device, store) as groups:
        if topology.role(global_rank) is Role.EXPERT:
            ep_rank = global_rank - topology.num_attention
            expert = make_expert_dispatcher(groups, membership, ep_rank, CONFIG, dtype, device)
            shard = FakeShard(membership.placement.shards[ep_rank])
            for plan in plans:
                expert.run_step(plan, shard)
            report = RankReport(epoch, global_rank, (expert.rows_received,), 0)
        else:
            attention = make_attention_dispatcher(groups, membership, global_rank, CONFIG, dtype, device)
            checked = 0
            for step, plan in enumerate(plans):
                attention.begin_step(plan)
                seeds = [f"{epoch}/{global_rank}/{step}/{index}" for index in range(num_micro_batches)]
                forwards = [
                    exchange_only(routed, seed, plan.tokens[global_rank][index], dtype, device)
                    for index, seed in enumerate(seeds)
                    if (routed := attention.routed(index)) is not None
                ]
                checked += sum(int(count) for count in run_micro_batches(forwards))
            report = RankReport(epoch, global_rank, attention.rows_sent, checked)
        # As a step loop does: agree that the epoch ends, then leave without waiting for anybody.
        headers = HeaderExchange(groups, membership, global_rank, num_micro_batches, len(CONFIG.moe_layers))
        assert headers.exchange(StepHeader(epoch, (0,) * num_micro_batches, ends=True)).ends
    return report


def exchange_only(
    routed: RoutedExperts, seed: str, num_tokens: int, dtype: torch.dtype, device: torch.device
) -> Generator[None, None, torch.Tensor]:
    """A forward pass of one micro-batch that only exchanges; returns how many sums it checked."""
    rng = random.Random(seed)
    checked = 0
    for layer in CONFIG.moe_layers:
        generator = torch.Generator().manual_seed(rng.randrange(2**31))
        # Sometimes all tokens choose among few experts, so that shards stay without a row.
        choice = NUM_EXPERTS if rng.random() < 0.5 else CONFIG.num_experts_per_tok
        scores = torch.rand(num_tokens, choice, generator=generator)
        topk_weights, topk_ids = scores.topk(CONFIG.num_experts_per_tok, dim=1)
        hidden = torch.randn(num_tokens, CONFIG.hidden_size, generator=generator).to(dtype)
        pending = routed.dispatch(layer, hidden.to(device), topk_ids.to(device), topk_weights.to(device))
        yield
        result = pending.wait()
        assert result.dtype is dtype
        tolerance = 1e-5 if dtype is torch.float32 else 2e-2
        torch.testing.assert_close(
            result.cpu().double(),
            slow_moe(layer, hidden, topk_ids, topk_weights),
            rtol=tolerance,
            atol=tolerance * 50,
        )
        checked += num_tokens
    return torch.tensor(checked)


@dataclass(frozen=True)
class Case:
    """One epoch of a test."""

    num_attention: int
    num_expert: int
    num_micro_batches: int
    dtype: torch.dtype


def run_cases(
    rendezvous: Rendezvous, cases: tuple[Case, ...], backend: str, device_name: str, index: int
) -> list[RankReport]:
    """What process `index` does: takes part in every case that has such a rank, one epoch after another."""
    reports = []
    for epoch, case in enumerate(cases, start=1):
        if index >= case.num_attention + case.num_expert:
            continue
        membership = membership_of(rendezvous, epoch, case.num_attention, case.num_expert, backend)
        place = f"{device_name}:{index}" if backend == "nccl" else device_name
        reports.append(run_rank_epoch(membership, index, case.num_micro_batches, 4, case.dtype, place))
    return reports


def rank_functions(
    rendezvous: Rendezvous, cases: tuple[Case, ...], backend: str, device_name: str
) -> list["partial[list[RankReport]]"]:
    """One function per process for `tests.ranks.run_ranks`."""
    most = max(case.num_attention + case.num_expert for case in cases)
    return [partial(run_cases, rendezvous, cases, backend, device_name, index) for index in range(most)]


def check_reports(cases: tuple[Case, ...], reports: list[RankReport]) -> None:
    """Every epoch ran on every rank, and every row sent was received."""
    for epoch, case in enumerate(cases, start=1):
        of_epoch = sorted((r for r in reports if r.epoch == epoch), key=lambda report: report.global_rank)
        assert [report.global_rank for report in of_epoch] == list(range(case.num_attention + case.num_expert))
        attention, expert = of_epoch[: case.num_attention], of_epoch[case.num_attention :]
        assert sum(report.checked for report in attention) > 0
        sent = [sum(report.rows[shard] for report in attention) for shard in range(case.num_expert)]
        assert sent == [report.rows[0] for report in expert]


def with_deadlines(membership: Membership, join_timeout_s: float, exchange_timeout_s: float) -> Membership:
    """The same membership with short deadlines, for tests of what happens when they pass."""
    return replace(membership, join_timeout_s=join_timeout_s, exchange_timeout_s=exchange_timeout_s)
