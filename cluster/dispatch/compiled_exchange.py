"""An exchange through shared memory as programs: what a rank does between its products and its peers'.

    attention   pack -> send                             receive -> add up
    expert      receive -> admit -> experts -> send

Between two exchanges a layer's weights go through all caches of a core, so that whatever runs then, be it Python or a
library, comes from memory: some 0.2 ms a side (benchmarks/NOTES.md). Few rows are exchanged this way. A program that
halts has done nothing of what follows; `cluster.dispatch.attention` and `cluster.dispatch.expert` then go the way that
many rows go, and that every other transport takes: it knows what to say.

An expert rank that computes on a team receives in a call of its own.

Shapes: A attention ranks with tokens, T tokens of one, N expert shards, H hidden size.
"""

import torch

from cluster.dispatch.base import ExpertCompute, PreparedExperts
from cluster.dispatch.compiled_rows import CompiledPack, sum_call
from cluster.dispatch.fence import HostFence
from cluster.dispatch.layout import DispatchSegments
from cluster.dispatch.row_batch import CompiledBatch
from cluster.dispatch.transport import SharedCarrier
from model_shards.kernels.program import Program


class AttentionExchange:
    """One micro-batch of an attention rank."""

    def __init__(
        self,
        pack: CompiledPack,
        dispatch: SharedCarrier,
        outgoing: DispatchSegments,
        combine: SharedCarrier,
        returning: torch.Tensor,  # [N, T, H]
    ) -> None:
        """`pack` is its own, `outgoing` and `returning` are what the carriers carry."""
        self._pack = pack
        self._outgoing = outgoing
        self._kept = (dispatch, combine, returning)  # programs have addresses of their parts only
        self._rows: tuple[torch.Tensor, ...] = ()
        self._sums = torch.empty(returning.shape[1:], dtype=returning.dtype)
        self._halt = combine.receiver.halt
        self._send = Program([*pack.calls, dispatch.sender.call])
        self._receive = Program([combine.receiver.call, sum_call(returning, self._sums)], self._halt)

    def send(self, hidden: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> None:
        """Packs rows and starts their dispatch."""
        rows = (hidden, topk_ids, topk_weights)
        # As a rule they are those of the layer before, and nothing is to be said anew.
        if not self._rows or any(new is not known for new, known in zip(rows, self._rows, strict=True)):
            contiguous = [part.contiguous() for part in rows]
            self._pack.place(contiguous[0], contiguous[1], contiguous[2], self._outgoing)
            # One that had to be copied is another one next time, too.
            self._rows = tuple(contiguous)
        self._send.run(1)

    def receive(self) -> torch.Tensor | None:
        """Waits for the combine, which was started, and adds it up: [T, H], until the next one. None when it must be
        waited for in the other way."""
        self._receive.run(1)
        return None if self._halt.is_set else self._sums


class ExpertExchange:
    """One micro-batch of an expert rank."""

    def __init__(
        self,
        shard: ExpertCompute,
        batch: CompiledBatch,
        fence: HostFence,
        dispatch: SharedCarrier,
        combine: SharedCarrier,
    ) -> None:
        """`batch` is what the carriers carry."""
        self._shard = shard
        self._batch = batch
        self._kept = (dispatch, combine)  # programs have addresses of their parts only
        self._halt = dispatch.receiver.halt
        self._admission = fence.admission(batch.headers, self._halt)
        self._receive = dispatch.receiver.call
        self._before = [self._admission.call, *batch.join]
        self._after = [*batch.split, combine.sender.call]
        self._prepared: PreparedExperts | None = None
        self._num_threads = torch.get_num_threads()
        self._programs: list[Program] = []

    def prepare(self) -> bool:
        """Whether rows can be computed this way; to be asked before each layer."""
        if self._prepared is not None and self._prepared.is_current:
            return True
        batch = self._batch
        rows = batch.rows
        self._prepared = self._shard.prepare(rows.hidden, rows.local_ids, rows.weights, batch.sums, self._halt)
        if self._prepared is None:
            return False
        # A team does not wait for peers together: its others would hold cores that these compute on.
        receive = [self._receive] if self._num_threads == 1 else []
        self._programs = [
            Program([*receive, *self._before, experts, *self._after], self._halt) for experts in self._prepared.programs
        ]
        return True

    def run(self, index: int) -> bool:
        """Receives a dispatch that was started, computes and sends the sums; `index` is the layer's among the MoE
        layers. False: it halted; rows that an expert refused then are counted already, and the step is lost."""
        if self._num_threads > 1:
            self._receive.run(1)
            if self._halt.is_set:
                return False
        self._programs[index].run(self._num_threads)
        return not self._halt.is_set
