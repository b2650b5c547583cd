"""The child's side of a cell of plain processes: what a rank's process does with the commands of `cluster.cell`.

parent --RankCommand--> rank   one pipe per rank
parent <--RankAnswer--- rank
"""

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection

from cluster.attention_replica import AttentionReplica
from cluster.control import Command, Join, Leave, OpenRendezvous
from cluster.epoch_thread import EpochEnd
from cluster.expert_shard import ExpertShard
from cluster.logs import configure_logging
from cluster.membership import Rendezvous
from cluster.request import GenerationRequest, ReplicaLoad, StepOutput
from cluster.spec import CellSpec
from cluster.topology import Role
from model_shards.errors import ShoalError


@dataclass(frozen=True)
class Cancel:
    """Parent to attention rank: cancel a request."""

    request_id: str


@dataclass(frozen=True)
class AskLoad:
    """Parent to attention rank: answer with the ReplicaLoad of the last step boundary."""


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


RankCommand = Command | GenerationRequest | Cancel | AskLoad | Stop
RankAnswer = Loaded | Rendezvous | Joined | EpochEnd | Failed | StepOutput | ReplicaLoad


class _Answers:
    """Sends answers to the parent from any thread."""

    def __init__(self, connection: "Connection[RankAnswer, RankCommand]") -> None:
        self._connection = connection
        self._lock = threading.Lock()

    def send(self, answer: RankAnswer) -> None:
        with self._lock:
            try:
                self._connection.send(answer)
            except (BrokenPipeError, OSError):
                # The parent is gone; the command loop meets the end of its pipe and stops this process.
                return


def expert_main(connection: "Connection[RankAnswer, RankCommand]", spec: CellSpec, global_rank: int) -> None:
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


def _commands(connection: "Connection[RankAnswer, RankCommand]") -> Iterator[RankCommand]:
    while True:
        try:
            yield connection.recv()
        except (EOFError, OSError):
            return


def attention_main(connection: "Connection[RankAnswer, RankCommand]", spec: CellSpec, global_rank: int) -> None:
    configure_logging(Role.ATTENTION.value, spec.topology.name(global_rank), spec.log_level)
    asyncio.run(_attention(connection, spec, global_rank))


async def _attention(connection: "Connection[RankAnswer, RankCommand]", spec: CellSpec, global_rank: int) -> None:
    answers = _Answers(connection)
    loop = asyncio.get_running_loop()
    try:
        replica = AttentionReplica(spec, global_rank, loop, answers.send)
    except ShoalError as error:
        answers.send(Failed(str(error)))
        return
    answers.send(Loaded())
    inbox: asyncio.Queue[RankCommand] = asyncio.Queue()
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
            case AskLoad():
                answers.send(replica.load())
            case Cancel(request_id):
                if request_id in streams:
                    streams[request_id].cancel()
            case GenerationRequest():
                task = loop.create_task(_stream(replica, command, answers))
                streams[command.request_id] = task
                task.add_done_callback(partial(_forget, streams, command.request_id))
    for task in list(streams.values()):
        task.cancel()
    await replica.close()


def _forward(
    connection: "Connection[RankAnswer, RankCommand]",
    loop: asyncio.AbstractEventLoop,
    inbox: "asyncio.Queue[RankCommand]",
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
