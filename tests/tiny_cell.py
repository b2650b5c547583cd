"""One attention replica and one expert shard in one process, over gloo on loopback, whose epochs a test makes."""

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from cluster.attention_replica import AttentionReplica
from cluster.epoch_thread import EpochEnd
from cluster.expert_shard import ExpertShard
from cluster.limits import EngineLimits
from cluster.membership import Membership
from cluster.request import GenerationRequest, StepOutput
from cluster.spec import CellSpec
from cluster.topology import Topology
from model_shards.config import load_model_config
from model_shards.sampling import SamplingParams

DEADLINE_S = 20.0
LIMITS = EngineLimits(
    max_model_len=128, max_num_seqs=4, max_num_batched_tokens=64, block_size=8, num_blocks=64, num_micro_batches=1
)


def greedy(request_id: str, length: int, max_tokens: int) -> GenerationRequest:
    """A request whose prompt is 1, 2, 3, ..."""
    return GenerationRequest(request_id, tuple(range(1, length + 1)), max_tokens, SamplingParams(0.0), ignore_eos=True)


@dataclass
class TinyCell:
    """A0 and E0. Build it with `tiny_cell`."""

    spec: CellSpec
    replica: AttentionReplica
    shard: ExpertShard
    ends: "asyncio.Queue[EpochEnd]"
    num_epochs: int = 0
    _tasks: "list[asyncio.Task[None]]" = field(default_factory=list)

    def membership(self, join_timeout_s: float = DEADLINE_S) -> Membership:
        """The next epoch, its store served."""
        self.num_epochs += 1
        spec = self.spec
        placement = spec.placement(load_model_config(Path(spec.model_directory)))
        rendezvous = self.replica.open_rendezvous(self.num_epochs)
        return Membership(self.num_epochs, spec.topology, placement, rendezvous, spec.backend, join_timeout_s, 10.0)

    async def next_epoch(self) -> None:
        """Both ranks join."""
        membership = self.membership()
        joined: list[Future[None]] = [self.replica.join(membership, 0), self.shard.join(membership, 1)]
        await asyncio.wait_for(asyncio.gather(*map(asyncio.wrap_future, joined)), DEADLINE_S)

    async def both_ended(self) -> list[EpochEnd]:
        """Waits until both ranks have left the epoch."""
        return [await asyncio.wait_for(self.ends.get(), DEADLINE_S) for _ in range(2)]

    def keep_going(self) -> None:
        """From now on a new epoch follows each that ends on both ranks."""

        async def run() -> None:
            while True:
                await self.both_ended()
                await self.next_epoch()

        self._tasks.append(asyncio.create_task(run()))

    async def generate(self, request: GenerationRequest) -> list[StepOutput]:
        """All outputs of a request."""

        async def collect() -> list[StepOutput]:
            return [output async for output in self.replica.generate(request)]

        return await asyncio.wait_for(collect(), DEADLINE_S)

    async def close(self) -> None:
        """Ends both threads."""
        for task in self._tasks:
            task.cancel()
        # The shard last: a replica that closes ends the epoch for both at the next boundary.
        assert await self.replica.close()
        assert await asyncio.to_thread(self.shard.close)


@asynccontextmanager
async def tiny_cell(
    directory: Path, rejoin_timeout_s: float = DEADLINE_S, attention_weights: str = "auto"
) -> AsyncIterator[TinyCell]:
    """A cell without an epoch yet, of the checkpoint in `directory`."""
    loop = asyncio.get_running_loop()
    ends: asyncio.Queue[EpochEnd] = asyncio.Queue()

    def ended(end: EpochEnd) -> None:
        loop.call_soon_threadsafe(ends.put_nowait, end)

    spec = CellSpec(str(directory), Topology(1, 1), "cpu", "float32", LIMITS, attention_weights=attention_weights)
    replica = AttentionReplica(spec, 0, loop, ended, rejoin_timeout_s)
    cell = TinyCell(spec, replica, ExpertShard(spec, 0, 0, ended), ends)
    try:
        yield cell
    finally:
        await cell.close()
