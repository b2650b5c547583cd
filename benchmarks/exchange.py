"""What one exchange costs: step header, dispatch and combine, without attention and experts.

python -m benchmarks.exchange --attention 1 --experts 2 --rows 1,32,256

Each transport runs in processes of its own, in turn, `--rounds` times; prints the median microseconds of one layer's
dispatch and combine together, and of one step header, and the ratio of the transports.
"""

import statistics
import time
from dataclasses import replace
from functools import partial
from typing import cast

import click
import torch

from benchmarks.mirror import Mirror
from cluster.dispatch import StepPlan, make_attention_dispatcher, make_expert_dispatcher
from cluster.membership import Membership, Rendezvous
from cluster.process_group import EpochGroups, open_epoch
from cluster.rendezvous import connect_rendezvous, serve_rendezvous
from cluster.step_header import HeaderExchange, StepHeader
from cluster.topology import Role, Topology
from model_shards.config import ModelConfig
from model_shards.placement import contiguous_placement
from tests.dispatch_cell import CONFIG
from tests.ranks import run_ranks, values

_NUM_EXPERTS = 64
_TOP_K = 6
_LAYERS = 12
_STEPS = 20
_CPU = torch.device("cpu")


def _config(hidden_size: int) -> ModelConfig:
    """The tests' cell that only exchanges, in the size of a model."""
    return replace(
        CONFIG,
        hidden_size=hidden_size,
        num_hidden_layers=_LAYERS + CONFIG.first_k_dense_replace,
        n_routed_experts=_NUM_EXPERTS,
        num_experts_per_tok=_TOP_K,
    )


def _run(
    rendezvous: Rendezvous, transport: str, topology: Topology, rows: int, hidden: int, rank: int
) -> tuple[float, float]:
    """Microseconds of one layer and of one header on this rank; medians over the steps."""
    torch.set_num_threads(1)
    placement = contiguous_placement(_NUM_EXPERTS, topology.num_expert)
    membership = Membership(1, topology, placement, rendezvous, transport, 60.0, 60.0)
    store = connect_rendezvous(rendezvous, 60.0)
    with open_epoch(membership, rank, _CPU, store) as groups:
        headers = HeaderExchange(groups, membership, rank, 1, _LAYERS)
        header_us: list[float] = []
        for _ in range(5 * _STEPS):
            begun = time.perf_counter()
            headers.exchange(StepHeader(1, (0,), ends=False))
            header_us.append((time.perf_counter() - begun) * 1e6)
        layer_us = _layers(groups, headers, membership, rank, rows, hidden)
        headers.exchange(StepHeader(1, (0,), ends=True))
    return layer_us, statistics.median(header_us)


def _layers(
    groups: EpochGroups, headers: HeaderExchange, membership: Membership, rank: int, rows: int, hidden: int
) -> float:
    topology, config = membership.topology, _config(hidden)
    plan = StepPlan(1, ((rows,),) * topology.num_attention)
    took: list[float] = []
    if topology.role(rank) is Role.EXPERT:
        mirror = Mirror(len(config.moe_layers))
        expert = make_expert_dispatcher(groups, membership, rank - topology.num_attention, config, torch.bfloat16, _CPU)
        for _ in range(_STEPS):
            headers.exchange(StepHeader(1, (0,), ends=False))
            expert.run_step(plan, mirror)
        return 0.0
    attention = make_attention_dispatcher(groups, membership, rank, config, torch.bfloat16, _CPU)
    tokens = torch.randn(rows, hidden, dtype=torch.bfloat16)
    ids = torch.stack([torch.randperm(_NUM_EXPERTS)[:_TOP_K] for _ in range(rows)])
    weights = torch.rand(rows, _TOP_K)
    for _ in range(_STEPS):
        headers.exchange(StepHeader(1, (rows,), ends=False))
        attention.begin_step(plan)
        routed = attention.routed(0)
        assert routed is not None, "the plan has rows"
        begun = time.perf_counter()
        for layer in config.moe_layers:
            routed.dispatch(layer, tokens, ids, weights).wait()
        took.append((time.perf_counter() - begun) / len(config.moe_layers) * 1e6)
    return statistics.median(took)


@click.command()
@click.option("--attention", default=1, show_default=True)
@click.option("--experts", default=2, show_default=True)
@click.option("--rows", "row_counts", default="1,32,256", show_default=True, help="Tokens of a micro-batch.")
@click.option("--hidden", default=1024, show_default=True)
@click.option("--rounds", default=3, show_default=True)
def main(attention: int, experts: int, row_counts: str, hidden: int, rounds: int) -> None:
    """Measures the transports; see the top of the file."""
    topology = Topology(attention, experts)
    click.echo(f"{attention} attention and {experts} expert ranks, hidden {hidden}, bf16; microseconds")
    click.echo("  rows   layer gloo    shm  ratio    header gloo    shm  ratio")
    for rows in map(int, row_counts.split(",")):
        layers: dict[str, list[float]] = {"gloo": [], "shm": []}
        headers: dict[str, list[float]] = {"gloo": [], "shm": []}
        for _ in range(rounds):
            for transport in layers:
                server = serve_rendezvous("127.0.0.1")
                run = partial(_run, server.rendezvous, transport, topology, rows, hidden)
                ranks = run_ranks([partial(run, rank) for rank in range(topology.world_size)], 120.0)
                results = cast("list[tuple[float, float]]", values(ranks))
                layers[transport].append(max(layer for layer, _ in results))
                headers[transport].append(statistics.median(header for _, header in results))
        row = [f"{rows:6d}"]
        for took in (layers, headers):
            gloo, shm = (statistics.median(took[transport]) for transport in ("gloo", "shm"))
            row.append(f"{gloo:12.0f} {shm:6.0f} {gloo / shm:5.1f}x")
        click.echo("  ".join(row))


if __name__ == "__main__":
    main()
