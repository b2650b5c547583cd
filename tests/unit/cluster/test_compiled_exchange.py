"""Exchanges through shared memory as programs, between threads of this process, against the way that many rows go."""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from cluster.dispatch import StepPlan, make_attention_dispatcher, make_expert_dispatcher
from cluster.dispatch.attention import ExpertTables
from cluster.dispatch.row_batch import RowBatch
from cluster.dispatch.trace import ExchangeTrace
from cluster.membership import Membership, Rendezvous
from cluster.shm.mesh import Mesh
from cluster.topology import Topology
from model_shards.errors import EpochAbortedError
from model_shards.placement import contiguous_placement
from tests.dispatch_cell import CONFIG, NUM_EXPERTS, FakeShard, exchange_only
from tests.meshes import meshes

CPU = torch.device("cpu")
DTYPE = torch.float32


def membership(num_attention: int, num_expert: int, timeout_s: float = 20.0) -> Membership:
    topology = Topology(num_attention, num_expert)
    placement = contiguous_placement(NUM_EXPERTS, num_expert)
    return Membership(1, topology, placement, Rendezvous("127.0.0.1", 1), "shm", timeout_s, timeout_s)


class Cell:
    """Dispatchers of all ranks; a step runs each on a thread."""

    def __init__(self, made: list[Mesh], members: Membership, trace: ExchangeTrace | None = None) -> None:
        topology = members.topology
        groups = [SimpleNamespace(mesh=mesh, data=None, backend="gloo") for mesh in made]
        self.attention = [
            make_attention_dispatcher(groups[rank], members, rank, CONFIG, DTYPE, CPU, trace)  # type: ignore[arg-type]
            for rank in range(topology.num_attention)
        ]
        self.experts = [
            make_expert_dispatcher(groups[topology.num_attention + rank], members, rank, CONFIG, DTYPE, CPU, trace)  # type: ignore[arg-type]
            for rank in range(topology.num_expert)
        ]
        self.shards = [FakeShard(experts) for experts in members.placement.shards]
        self.seed = 0
        self.num_threads = 1  # of each expert rank
        self.pause_s = 0.0  # of an attention rank while its rows of a layer are away

    def step(self, plan: StepPlan) -> dict[str, BaseException]:
        """The errors of ranks that met one."""
        self.seed += 1
        errors: dict[str, BaseException] = {}

        def guarded(name: str, function: Callable[[], object]) -> None:
            try:
                function()
            except BaseException as error:
                errors[name] = error

        def attend(rank: int) -> None:
            self.attention[rank].begin_step(plan)
            routed = self.attention[rank].routed(0)
            assert routed is not None
            for _ in exchange_only(routed, f"{self.seed}/{rank}", plan.tokens[rank][0], DTYPE, CPU):
                time.sleep(self.pause_s)

        def answer(rank: int) -> None:
            torch.set_num_threads(self.num_threads)  # this thread's alone
            self.experts[rank].run_step(plan, self.shards[rank])

        roles = (("A", attend, len(self.attention)), ("E", answer, len(self.experts)))
        threads = [
            threading.Thread(target=guarded, args=(f"{role}{rank}", lambda run=run, rank=rank: run(rank)))
            for role, run, count in roles
            for rank in range(count)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60.0)
        assert not any(thread.is_alive() for thread in threads)
        return errors


@pytest.fixture
def computed_in_the_other_way(monkeypatch) -> list[int]:
    """The layers that were, by expert ranks."""
    layers: list[int] = []
    compute = RowBatch.compute

    def counted(self, layer, shard):
        layers.append(layer)
        compute(self, layer, shard)

    monkeypatch.setattr(RowBatch, "compute", counted)
    return layers


@pytest.fixture
def added_up_in_the_other_way(monkeypatch) -> list[int]:
    """The tokens that were, by attention ranks, layer after layer."""
    tokens: list[int] = []
    add_up = ExpertTables.add_up

    def counted(self, returned):
        tokens.append(returned.shape[1])
        return add_up(self, returned)

    monkeypatch.setattr(ExpertTables, "add_up", counted)
    return tokens


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("shape", "tokens"), [((1, 2), (3,)), ((2, 1), (2, 4)), ((2, 3), (0, 5))])
def test_few_rows_go_through_programs_alone_once_their_memory_is_known(
    shape, tokens, threads, computed_in_the_other_way, added_up_in_the_other_way
) -> None:
    members = membership(*shape)
    plan = StepPlan(1, tuple((count,) for count in tokens))
    with meshes(sum(shape)) as made:
        cell = Cell(made, members)
        cell.num_threads = threads
        assert cell.step(plan) == {}
        # Where a peer's memory is not mapped yet, a program halts, and the other way maps it.
        assert computed_in_the_other_way
        assert added_up_in_the_other_way
        computed_in_the_other_way.clear()
        added_up_in_the_other_way.clear()
        for _ in range(5):
            assert cell.step(plan) == {}
        assert computed_in_the_other_way == []
        assert added_up_in_the_other_way == []
        sent = sum(sum(attention.rows_sent) for attention in cell.attention)
        assert sent == sum(expert.rows_received for expert in cell.experts) > 0


def test_many_rows_and_few_take_turns(computed_in_the_other_way) -> None:
    members = membership(1, 2)
    with meshes(3) as made:
        cell = Cell(made, members)
        for count in (3, 20, 3, 300, 3, 3, 1, 20):
            computed_in_the_other_way.clear()
            assert cell.step(StepPlan(1, ((count,),))) == {}
            if count > 8:
                assert len(computed_in_the_other_way) == 2 * len(CONFIG.moe_layers)
        assert cell.experts[0].rows_received == cell.attention[0].rows_sent[0]


def test_a_segment_of_another_epoch_is_refused_before_it_is_computed() -> None:
    members = membership(1, 1)
    plan, stranger = StepPlan(1, ((2,),)), StepPlan(2, ((2,),))
    with meshes(2) as made:
        cell = Cell(made, members)
        assert cell.step(plan) == {}
        received = cell.experts[0].rows_received
        cell.attention[0].begin_step(stranger)
        routed = cell.attention[0].routed(0)
        assert routed is not None
        next(exchange_only(routed, "stranger", 2, DTYPE, CPU))
        with pytest.raises(EpochAbortedError, match="rank E0 received 1 segments of another epoch than 1"):
            cell.experts[0].run_step(plan, cell.shards[0])
        assert cell.experts[0].rows_received == received


def test_a_peer_that_leaves_or_says_nothing_is_named_with_the_exchange() -> None:
    plan = StepPlan(1, ((2,),))
    with meshes(2) as made:
        cell = Cell(made, membership(1, 1, timeout_s=0.5))
        assert cell.step(plan) == {}
        with pytest.raises(
            EpochAbortedError,
            match=r"dispatch of layer 1, micro-batch 0, epoch 1 on rank E0 failed: .*R0 sent nothing in time",
        ):
            cell.experts[0].run_step(plan, cell.shards[0])
    with meshes(2) as made:
        cell = Cell(made, membership(1, 1))
        assert cell.step(plan) == {}
        made[1].close()
        cell.attention[0].begin_step(plan)
        routed = cell.attention[0].routed(0)
        assert routed is not None
        forward = exchange_only(routed, "alone", 2, DTYPE, CPU)
        next(forward)
        with pytest.raises(EpochAbortedError, match=r"combine of layer 1, .* on rank A0 failed: .*R1 left the epoch"):
            next(forward)


def test_a_closed_epoch_sends_nothing_and_writes_to_no_memory() -> None:
    plan = StepPlan(1, ((2,),))
    with meshes(2) as made:
        cell = Cell(made, membership(1, 1))
        assert cell.step(plan) == {}
        made[0].close()
        sent = made[0].messages_sent
        cell.attention[0].begin_step(plan)
        routed = cell.attention[0].routed(0)
        assert routed is not None
        forward = exchange_only(routed, "late", 2, DTYPE, CPU)
        next(forward)
        assert made[0].messages_sent == sent
        with pytest.raises(EpochAbortedError, match="rank A0 could not start: this rank has left the epoch"):
            next(forward)
        with pytest.raises(EpochAbortedError, match="epoch 1 on rank A0: this rank has left the epoch"):
            cell.attention[0].begin_step(StepPlan(1, ((3,),)))


def test_traced_waits_are_those_of_the_other_way(
    computed_in_the_other_way, added_up_in_the_other_way, tmp_path
) -> None:
    with meshes(2) as made:
        trace = ExchangeTrace("both")
        cell = Cell(made, membership(1, 1), trace)
        for _ in range(3):
            assert cell.step(StepPlan(1, ((2,),))) == {}
        layers = 3 * len(CONFIG.moe_layers)
        assert len(computed_in_the_other_way) == len(added_up_in_the_other_way) == layers
        trace.write(tmp_path, 1)
    events = json.loads((tmp_path / "both-epoch-1.json").read_text())["traceEvents"]
    # Either rank waits for both directions of each layer.
    assert Counter(event["cat"] for event in events) == {"dispatch": 2 * layers, "combine": 2 * layers}


class SlowShard(FakeShard):
    """Takes a while over each layer."""

    def __init__(self, experts: tuple[int, ...], seconds: float) -> None:
        super().__init__(experts)
        self._seconds = seconds

    def forward(self, layer, hidden, local_ids, weights):
        time.sleep(self._seconds)
        return super().forward(layer, hidden, local_ids, weights)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("rows", [3, 20])
def test_either_role_tells_its_waiting_from_its_work_in_either_way(rows, threads, computed_in_the_other_way) -> None:
    layers, pause_s = len(CONFIG.moe_layers), 0.2
    members = membership(1, 1)
    plan = StepPlan(1, ((rows,),))
    with meshes(2) as made:
        cell = Cell(made, members)
        cell.num_threads = threads
        attention, expert = cell.attention[0], cell.experts[0]
        assert expert.computed_s is None
        for _ in range(2):
            assert cell.step(plan) == {}
        computed_in_the_other_way.clear()

        def step() -> tuple[float, float, float]:
            """Seconds by the clock, that the attention rank waited, and that the expert rank did not."""
            begun, waited = time.perf_counter(), attention.waited_s
            assert cell.step(plan) == {}
            assert waited is not None
            return time.perf_counter() - begun, attention.waited_s - waited, expert.computed_s

        cell.shards = [SlowShard(experts, pause_s) for experts in members.placement.shards]
        step()  # in which these are prepared
        seconds, waited, computed = step()
        # Whatever else the machine does: what sleeps is not waiting, and some of the pause is seen from the other side.
        assert layers * pause_s * 0.99 <= computed <= seconds
        assert pause_s / 10 <= waited <= seconds
        cell.shards = [FakeShard(experts) for experts in members.placement.shards]
        step()
        cell.pause_s = pause_s
        seconds, waited, computed = step()
        assert layers * pause_s * 0.99 <= seconds - waited
        assert 0 < computed <= seconds - pause_s / 10
        assert bool(computed_in_the_other_way) is (rows > 8)
