"""A cell of plain processes on one host, without Ray: for tests and benchmarks, the same engine.

parent --commands--> A0 .. A(M-1), E0 .. E(N-1)      one pipe each
parent <--answers---

with Cell(spec) as cell:
    outputs = cell.generate(requests, timeout_s=60)
"""

import multiprocessing
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from cluster.cell_rank import (
    AskLoad,
    Cancel,
    Failed,
    Joined,
    Loaded,
    RankAnswer,
    RankCommand,
    Stop,
    attention_main,
    expert_main,
)
from cluster.control import Join, Leave, OpenRendezvous
from cluster.device import RANK_ENVIRONMENT
from cluster.epoch_thread import EpochEnd
from cluster.membership import Membership, Rendezvous
from cluster.request import FinishReason, GenerationRequest, ReplicaLoad, StepOutput
from cluster.spec import CellSpec
from cluster.topology import Role
from model_shards.config import load_model_config
from model_shards.errors import UnavailableError

_Kind = TypeVar("_Kind")
_KILLED_S = 5.0


@contextmanager
def _rank_environment() -> Iterator[None]:
    """What a child started inside the block has in its environment beside this process's; what is set there stays."""
    added = [name for name in RANK_ENVIRONMENT if name not in os.environ]
    os.environ.update({name: RANK_ENVIRONMENT[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


@dataclass(frozen=True)
class _Child:
    """A rank's process, the pipe to it, and its answers that nobody has asked for yet."""

    process: BaseProcess
    connection: "Connection[RankCommand, RankAnswer]"
    inbox: "deque[RankAnswer]" = field(default_factory=deque)


class Cell:
    """M + N processes and one epoch, ready when entered. Leaving it ends every process."""

    def __init__(self, spec: CellSpec, start_timeout_s: float = 120.0) -> None:
        self._spec = spec
        self._start_timeout_s = start_timeout_s
        self._children: list[_Child] = []
        self._epoch = 0
        self._outputs: deque[StepOutput | Failed] = deque()

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def processes(self) -> tuple[BaseProcess, ...]:
        """In order of global rank."""
        return tuple(child.process for child in self._children)

    def submit(self, attention_rank: int, request: GenerationRequest) -> None:
        """Hands a request to a replica; its outputs come from `outputs`."""
        self._children[attention_rank].connection.send(request)

    def cancel(self, attention_rank: int, request_id: str) -> None:
        """Cancels a request on its replica; no further output of it comes."""
        self._children[attention_rank].connection.send(Cancel(request_id))

    def load(self, attention_rank: int) -> ReplicaLoad:
        """A replica's load as of its last step boundary."""
        self._children[attention_rank].connection.send(AskLoad())
        deadline = time.monotonic() + self._start_timeout_s
        return self._await_answer(attention_rank, ReplicaLoad, "tell its load", deadline)

    def outputs(self, timeout_s: float) -> Iterator[StepOutput]:
        """Outputs as they come, until the caller stops asking.

        Raises UnavailableError when nothing came for `timeout_s`, a rank died, or a request failed.
        """
        while True:
            while not self._outputs:
                self._receive(time.monotonic() + timeout_s, f"no output came for {timeout_s:g} s")
            output = self._outputs.popleft()
            if isinstance(output, Failed):
                raise UnavailableError(f"request {output.request_id} failed: {output.error}")
            yield output

    def generate(self, requests: Sequence[GenerationRequest], timeout_s: float) -> dict[str, tuple[int, ...]]:
        """Runs all requests, dealt round robin to the replicas; tokens by request id."""
        for index, request in enumerate(requests):
            self.submit(index % self._spec.topology.num_attention, request)
        tokens: dict[str, tuple[int, ...]] = {request.request_id: () for request in requests}
        running = set(tokens)
        outputs = self.outputs(timeout_s)
        while running:
            output = next(outputs)
            tokens[output.request_id] += output.token_ids
            if output.finish_reason is FinishReason.ERROR:
                raise UnavailableError(f"request {output.request_id} failed: {output.error}")
            if output.finish_reason is not None:
                running.discard(output.request_id)
        return tokens

    def next_epoch(self) -> None:
        """Ends the running epoch at a step boundary, on all ranks, and joins the next one."""
        self._leave_epoch(range(len(self._children)))
        self._join_next()

    def replace(self, global_rank: int) -> None:
        """Puts a new process in a rank's place, killing the one there, and joins the next epoch with all ranks.

        Requests of the other replicas go on; those of a replaced replica are lost.
        """
        old = self._children[global_rank]
        old.process.kill()
        old.process.join(_KILLED_S)
        old.connection.close()
        self._children[global_rank] = self._spawn(global_rank)
        self._await_each([global_rank], Loaded, "load its weights")
        self._leave_epoch(rank for rank in range(len(self._children)) if rank != global_rank)
        self._join_next()

    def close(self, timeout_s: float = 10.0) -> None:
        """Stops every process; what does not end in time is killed."""
        for child in self._children:
            try:
                child.connection.send(Stop())
            except (BrokenPipeError, OSError):
                # That process is gone already, which is what is wanted.
                continue
        deadline = time.monotonic() + timeout_s
        for child in self._children:
            child.process.join(max(0.1, deadline - time.monotonic()))
            if child.process.is_alive():
                child.process.kill()
                child.process.join(_KILLED_S)
            child.connection.close()
        self._children.clear()

    def _start(self) -> None:
        for global_rank in range(self._spec.topology.world_size):
            self._children.append(self._spawn(global_rank))
        self._await_each(range(len(self._children)), Loaded, "load its weights")
        self._join_next()

    def _spawn(self, global_rank: int) -> _Child:
        topology = self._spec.topology
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        main = attention_main if topology.role(global_rank) is Role.ATTENTION else expert_main
        process = context.Process(target=main, args=(theirs, self._spec, global_rank), name=topology.name(global_rank))
        with _rank_environment():
            process.start()
        theirs.close()
        return _Child(process, ours)

    def _leave_epoch(self, ranks: Iterable[int]) -> None:
        """These ranks end the epoch; on some it may be over already, aborted by a lost rank."""
        remaining = list(ranks)
        for global_rank in remaining:
            self._children[global_rank].connection.send(Leave(self._epoch))
        self._await_each(remaining, EpochEnd, "leave the epoch")

    def _join_next(self) -> None:
        self._epoch += 1
        self._children[0].connection.send(OpenRendezvous(self._epoch))
        deadline = time.monotonic() + self._start_timeout_s
        rendezvous = self._await_answer(0, Rendezvous, "open the rendezvous", deadline)
        spec = self._spec
        placement = spec.placement(load_model_config(Path(spec.model_directory)))
        membership = Membership(
            self._epoch,
            spec.topology,
            placement,
            rendezvous,
            spec.backend,
            spec.join_timeout_s,
            spec.exchange_timeout_s,
        )
        for global_rank, child in enumerate(self._children):
            child.connection.send(Join(membership, global_rank))
        self._await_each(range(len(self._children)), Joined, "join the epoch")

    def _await_each(self, ranks: Iterable[int], kind: type[_Kind], what: str) -> None:
        deadline = time.monotonic() + self._start_timeout_s
        for global_rank in ranks:
            self._await_answer(global_rank, kind, what, deadline)

    def _await_answer(self, global_rank: int, kind: type[_Kind], what: str, deadline: float) -> _Kind:
        inbox = self._children[global_rank].inbox
        while True:
            while not inbox:
                self._receive(deadline, f"rank {self._spec.topology.name(global_rank)} did not {what}")
            answer = inbox.popleft()
            if isinstance(answer, Failed):
                raise UnavailableError(f"rank {self._spec.topology.name(global_rank)} did not {what}: {answer.error}")
            if isinstance(answer, kind):
                return answer

    def _receive(self, deadline: float, late: str) -> None:
        """Takes what the ranks sent; blocks until something came. Raises UnavailableError at the deadline."""
        ready = wait([child.connection for child in self._children], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise UnavailableError(f"{late} in time")
        for global_rank, child in enumerate(self._children):
            if child.connection not in ready:
                continue
            try:
                answer = child.connection.recv()
            except (EOFError, OSError):
                raise UnavailableError(f"rank {self._spec.topology.name(global_rank)} died") from None
            if isinstance(answer, StepOutput) or (isinstance(answer, Failed) and answer.request_id is not None):
                self._outputs.append(answer)
            else:
                child.inbox.append(answer)
