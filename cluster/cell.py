"""A cell of plain processes on one host, without Ray: for tests and benchmarks, the same engine.

parent --commands--> A0 .. A(M-1), E0 .. E(N-1)      one pipe each
parent <--answers---

with Cell(spec) as cell:
    outputs = cell.generate(requests, timeout_s=60)
"""

import asyncio
import multiprocessing
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Self

from cluster.attention_replica import AttentionReplica
from cluster.control import Command, Join, Leave, OpenRendezvous
from cluster.epoch_thread import EpochEnd
from cluster.expert_shard import ExpertShard
from cluster.logs import configure_logging
from cluster.membership import Membership, Rendezvous
from cluster.request import FinishReason, GenerationRequest, StepOutput
from cluster.spec import CellSpec
from cluster.topology import Role
from model_shards.config import load_model_config
from model_shards.errors import ShoalError, UnavailableError


@dataclass(frozen=True)
class Cancel:
    """Parent to attention rank: cancel a request."""

    request_id: str


@dataclass(frozen=True)
class Stop:
    """Parent to rank: leave and exit."""


@dataclass(frozen=True)
class Loaded:
    """Rank to parent: the weights are in memory."""


@dataclass(frozen=True)
class Joined:
    """Rank to parent: the process groups of this epoch stand."""

    epoch: int


@dataclass(frozen=True)
class Failed:
    """Rank to parent: this went wrong."""

    error: str
    request_id: str | None = None


_Command = Command | GenerationRequest | Cancel | Stop
_Answer = Loaded | Rendezvous | Joined | EpochEnd | Failed | StepOutput


class _Answers:
    """Sends answers to the parent from any thread."""

    def __init__(self, connection: "Connection[_Answer, _Command]") -> None:
        self._connection = connection
        self._lock = threading.Lock()

    def send(self, answer: _Answer) -> None:
        with self._lock:
            try:
                self._connection.send(answer)
            except (BrokenPipeError, OSError):
                # The parent is gone; the command loop meets the end of its pipe and stops this process.
                return


def _expert_main(connection: "Connection[_Answer, _Command]", spec: CellSpec, global_rank: int) -> None:
    ep_rank = global_rank - spec.topology.num_attention
    configure_logging(Role.EXPERT.value, spec.topology.name(global_rank), spec.log_level)
    answers = _Answers(connection)
    try:
        shard = ExpertShard(spec, ep_rank, global_rank, answers.send)
    except ShoalError as error:
        answers.send(Failed(str(error)))
        return
    answers.send(Loaded())
    for command in _commands(connection):
        match command:
            case Join(membership, rank):
                future = shard.join(membership, rank)
                future.add_done_callback(partial(_report_join, answers, membership.epoch))
            case Leave(epoch):
                shard.leave(epoch)
            case _:
                break
    shard.close()


def _forget(streams: "dict[str, asyncio.Task[None]]", request_id: str, _: "asyncio.Task[None]") -> None:
    streams.pop(request_id, None)


def _report_join(answers: _Answers, epoch: int, joined: "Future[None]") -> None:
    error = joined.exception()
    answers.send(Joined(epoch) if error is None else Failed(f"epoch {epoch}: {error}"))


def _commands(connection: "Connection[_Answer, _Command]") -> Iterator[_Command]:
    while True:
        try:
            yield connection.recv()
        except (EOFError, OSError):
            return


def _attention_main(connection: "Connection[_Answer, _Command]", spec: CellSpec, global_rank: int) -> None:
    configure_logging(Role.ATTENTION.value, spec.topology.name(global_rank), spec.log_level)
    asyncio.run(_attention(connection, spec, global_rank))


async def _attention(connection: "Connection[_Answer, _Command]", spec: CellSpec, global_rank: int) -> None:
    answers = _Answers(connection)
    loop = asyncio.get_running_loop()
    try:
        replica = AttentionReplica(spec, global_rank, loop, answers.send)
    except ShoalError as error:
        answers.send(Failed(str(error)))
        return
    answers.send(Loaded())
    inbox: asyncio.Queue[_Command] = asyncio.Queue()
    threading.Thread(target=_forward, args=(connection, loop, inbox), daemon=True).start()
    streams: dict[str, asyncio.Task[None]] = {}
    while not isinstance(command := await inbox.get(), Stop):
        match command:
            case OpenRendezvous(epoch):
                answers.send(replica.open_rendezvous(epoch))
            case Join(membership, rank):
                future = replica.join(membership, rank)
                future.add_done_callback(partial(_report_join, answers, membership.epoch))
            case Leave(epoch):
                replica.leave(epoch)
            case Cancel(request_id):
                if request_id in streams:
                    streams[request_id].cancel()
            case GenerationRequest():
                task = loop.create_task(_stream(replica, command, answers))
                streams[command.request_id] = task
                task.add_done_callback(partial(_forget, streams, command.request_id))
    for task in list(streams.values()):
        task.cancel()
    await asyncio.to_thread(replica.close)


def _forward(
    connection: "Connection[_Answer, _Command]", loop: asyncio.AbstractEventLoop, inbox: "asyncio.Queue[_Command]"
) -> None:
    for command in _commands(connection):
        loop.call_soon_threadsafe(inbox.put_nowait, command)
        if isinstance(command, Stop):
            return
    loop.call_soon_threadsafe(inbox.put_nowait, Stop())


async def _stream(replica: AttentionReplica, request: GenerationRequest, answers: _Answers) -> None:
    try:
        async for output in replica.generate(request):
            answers.send(output)
    except ShoalError as error:
        answers.send(Failed(str(error), request.request_id))


class Cell:
    """M + N processes and one epoch, ready when entered. Leaving it ends every process."""

    def __init__(self, spec: CellSpec, start_timeout_s: float = 120.0) -> None:
        self._spec = spec
        self._start_timeout_s = start_timeout_s
        self._processes: list[BaseProcess] = []
        self._connections: list[Connection[_Command, _Answer]] = []
        self._epoch = 0
        self._inboxes: list[deque[_Answer]] = []
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
        return tuple(self._processes)

    def submit(self, attention_rank: int, request: GenerationRequest) -> None:
        """Hands a request to a replica; its outputs come from `outputs`."""
        self._connections[attention_rank].send(request)

    def cancel(self, attention_rank: int, request_id: str) -> None:
        """Cancels a request on its replica; no further output of it comes."""
        self._connections[attention_rank].send(Cancel(request_id))

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
        if self._epoch > 0:
            for connection in self._connections:
                connection.send(Leave(self._epoch))
            self._await_each(EpochEnd, "leave the epoch")
        self._join_next()

    def close(self, timeout_s: float = 10.0) -> None:
        """Stops every process; what does not end in time is killed."""
        for connection in self._connections:
            try:
                connection.send(Stop())
            except (BrokenPipeError, OSError):
                # That process is gone already, which is what is wanted.
                continue
        deadline = time.monotonic() + timeout_s
        for process in self._processes:
            process.join(max(0.1, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join(5.0)
        for connection in self._connections:
            connection.close()
        self._processes.clear()
        self._connections.clear()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        for global_rank in range(self._spec.topology.world_size):
            ours, theirs = context.Pipe()
            role = self._spec.topology.role(global_rank)
            main = _attention_main if role is Role.ATTENTION else _expert_main
            process = context.Process(
                target=main, args=(theirs, self._spec, global_rank), name=self._spec.topology.name(global_rank)
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)
            self._inboxes.append(deque())
        self._await_each(Loaded, "load its weights")
        self._join_next()

    def _join_next(self) -> None:
        self._epoch += 1
        self._connections[0].send(OpenRendezvous(self._epoch))
        deadline = time.monotonic() + self._start_timeout_s
        rendezvous = self._await_answer(0, Rendezvous, "open the rendezvous", deadline)
        assert isinstance(rendezvous, Rendezvous)
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
        for global_rank, connection in enumerate(self._connections):
            connection.send(Join(membership, global_rank))
        self._await_each(Joined, "join the epoch")

    def _await_each(self, kind: type, what: str) -> None:
        deadline = time.monotonic() + self._start_timeout_s
        for global_rank in range(len(self._connections)):
            self._await_answer(global_rank, kind, what, deadline)

    def _await_answer(self, global_rank: int, kind: type, what: str, deadline: float) -> _Answer:
        inbox = self._inboxes[global_rank]
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
        ready = wait(self._connections, max(0.0, deadline - time.monotonic()))
        if not ready:
            raise UnavailableError(f"{late} in time")
        for global_rank, connection in enumerate(self._connections):
            if connection not in ready:
                continue
            try:
                answer = connection.recv()
            except (EOFError, OSError):
                raise UnavailableError(f"rank {self._spec.topology.name(global_rank)} died") from None
            if isinstance(answer, StepOutput) or (isinstance(answer, Failed) and answer.request_id is not None):
                self._outputs.append(answer)
            else:
                self._inboxes[global_rank].append(answer)
