"""A gateway's end and a replica's end of the link on one event loop, over a replica whose outputs a test pushes."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

from cluster.link.hub import OutputHub
from cluster.link.receiver import OutputLink, OutputStream
from cluster.outputs import OnOutput
from cluster.request import FinishReason, GenerationRequest, StepOutput

LAST = FinishReason.LENGTH


def request_of(name: str) -> GenerationRequest:
    """A request with that id."""
    return GenerationRequest(name, (1, 2), 4)


def output(name: str, *token_ids: int, reason: FinishReason | None = None) -> StepOutput:
    """An output of that request."""
    return StepOutput(name, token_ids, reason)


@dataclass
class FakeReplica:
    """An AttentionReplica's `open_stream`: the streams that are open, by request id, and when one is, an event."""

    error: Exception | None = None  # raised at the door
    running: dict[str, OnOutput] = field(default_factory=dict)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    @contextmanager
    def open_stream(self, request: GenerationRequest, on_output: OnOutput) -> Iterator[None]:
        if self.error is not None:
            raise self.error
        self.running[request.request_id] = on_output
        self.changed.set()
        try:
            yield
        finally:
            del self.running[request.request_id]
            self.changed.set()

    def step(self, *outputs: StepOutput) -> None:
        """Pushes the outputs of one step, in one callback as a replica does."""
        for entry in outputs:
            self.running[entry.request_id](entry)

    async def until_running(self, *names: str) -> None:
        """Waits until exactly these requests run."""
        while set(self.running) != set(names):
            self.changed.clear()
            await self.changed.wait()


@dataclass
class Linked:
    """Both ends. Build it with `linked`."""

    link: OutputLink
    replica: FakeReplica
    hub: OutputHub

    @asynccontextmanager
    async def call(self, name: str) -> AsyncIterator["tuple[OutputStream, asyncio.Task[None]]"]:
        """A request that runs in the replica: its stream, and the call that Serve would carry."""
        with self.link.open_stream(name) as stream:
            call = asyncio.create_task(self.hub.run(request_of(name), stream.address))
            try:
                yield stream, call
            finally:
                call.cancel()
                await asyncio.wait([call])


@asynccontextmanager
async def linked() -> AsyncIterator[Linked]:
    """An open link on loopback, and a hub that has not connected yet."""
    link = await OutputLink.open("127.0.0.1")
    replica = FakeReplica()
    hub = OutputHub(replica)
    try:
        yield Linked(link, replica, hub)
    finally:
        hub.close()
        await link.close()
        await asyncio.sleep(0)
