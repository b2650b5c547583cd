"""An attention rank: asyncio in front, the step loop's thread behind, one queue per direction between them."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

from cluster.device import (
    attention_in_int8,
    available_cores,
    kv_quantization,
    local_device,
    meanwhile_threads,
    pin_threads,
    torch_dtype,
    use_threads,
)
from cluster.engine import Engine
from cluster.epoch_thread import EpochEnd, EpochThread, OnEpochEnd
from cluster.logs import log_event
from cluster.membership import Membership, Rendezvous
from cluster.outputs import OnOutput, OutputQueue, next_output
from cluster.rendezvous import RendezvousServer, serve_rendezvous
from cluster.request import GenerationRequest, ReplicaLoad, StepOutput
from cluster.spec import CellSpec
from cluster.step_loop import StepEvents, StepLoop
from cluster.topology import Role
from model_shards.config import load_model_config
from model_shards.errors import InvalidRequestError, ShoalError, UnavailableError
from model_shards.kv_cache import LatentKVCache, bytes_per_block
from model_shards.weights import Progress, load_attention_model

logger = logging.getLogger(__name__)


class AttentionReplica:
    """One replica, its weights loaded when constructed. Build and use it on one running event loop.

    Requests survive an aborted epoch: they wait for the next one, at most `rejoin_timeout_s`.
    """

    def __init__(
        self,
        spec: CellSpec,
        device_index: int,
        loop: asyncio.AbstractEventLoop,
        on_epoch_end: OnEpochEnd,
        rejoin_timeout_s: float = 120.0,
        progress: Progress | None = None,
    ) -> None:
        device = local_device(spec, device_index)
        directory = Path(spec.model_directory)
        config = load_model_config(directory)
        dtype = torch_dtype(spec)
        quantization, in_int8 = kv_quantization(spec), attention_in_int8(spec)
        kv_cache_bytes = spec.limits.num_blocks * bytes_per_block(config, spec.limits.block_size, dtype, quantization)
        model = load_attention_model(directory, config, dtype, device, progress, kv_cache_bytes)
        model.lay_out(in_int8)
        if spec.device == "cpu":
            model.limit_meanwhile(meanwhile_threads(spec.topology, available_cores()))
        cache = LatentKVCache(config, spec.limits.num_blocks, spec.limits.block_size, dtype, device, quantization)
        engine = Engine(config, model, cache, spec.limits)
        self._spec = spec
        self._model = model
        self._loop = loop
        self._streams: dict[str, _Stream] = {}
        self._on_epoch_end = on_epoch_end
        self._rejoin_timeout_s = rejoin_timeout_s
        self._rendezvous: dict[int, RendezvousServer] = {}
        self._give_up: asyncio.TimerHandle | None = None  # runs from the loss of an epoch to the next one joined
        self._lost: str | None = None  # it ran out, with this to say, and no epoch was joined since
        self._closing = False
        self._step_loop = StepLoop(
            engine, config, dtype, device, spec.limits.num_micro_batches, self._cross, spec.trace_directory
        )
        self._thread = EpochThread("step-loop", self._run_epoch, self._epoch_ended)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[StepOutput, None]:
        """Streams a request's tokens; ends after the output with a finish reason.

        Leaving the iterator early cancels the request: its blocks are free within a step. Outputs that queued up
        while the consumer was slow arrive as one. Raises InvalidRequestError when the request can never fit and
        UnavailableError when the cell was lost and did not come back in time.
        """
        queue: OutputQueue = asyncio.Queue()
        with self.open_stream(request, queue.put_nowait):
            ended = False
            while not ended:
                # No deadline here: the step loop answers every request, and `_fail_all` ends them when it cannot.
                output = await next_output(queue)
                ended = output.finish_reason is not None
                yield output

    @contextmanager
    def open_stream(self, request: GenerationRequest, on_output: OnOutput) -> Iterator[None]:
        """Runs a request inside the block; leaving it before the request ended cancels it.

        `on_output` is called on the event loop with each output, those of one step in one go; the last one has a finish
        reason or is an error. Raises InvalidRequestError and UnavailableError at the door.
        """
        if request.request_id in self._streams:
            raise InvalidRequestError(f"request id {request.request_id} is already running")
        if self._lost is not None:
            raise UnavailableError(self._lost)
        stream = self._streams[request.request_id] = _Stream(on_output)
        try:
            self._step_loop.submit(request)
            yield
        finally:
            del self._streams[request.request_id]
            if not stream.ended:
                self._step_loop.cancel(request.request_id)

    def load(self) -> ReplicaLoad:
        """Load as of the last step boundary."""
        return self._step_loop.load()

    def open_rendezvous(self, epoch: int) -> Rendezvous:
        """Serves the store of an epoch (rank 0 only); stores of older epochs are closed."""
        for old in [number for number in self._rendezvous if number < epoch - 1]:
            del self._rendezvous[old]
        server = serve_rendezvous(self._spec.host)
        self._rendezvous[epoch] = server
        return server.rendezvous

    def join(self, membership: Membership, global_rank: int) -> "Future[None]":
        """Joins an epoch; the future is done once the process groups stand."""
        return self._thread.join(membership, global_rank, self._join_done)

    def leave(self, epoch: int) -> None:
        """Ends this epoch at its next step boundary, or at once while it is joined; requests wait for the next one."""
        self._step_loop.leave(epoch)

    async def close(self, timeout_s: float = 5.0) -> bool:
        """Fails what still runs and what comes later, and ends the thread; whether it ended in time."""
        self._closing = True
        self._lost = "this replica is shutting down; send the request again"
        self._fail_all(self._lost)
        # Both may wait: one for the epoch's store, the other for the step under way.
        await asyncio.to_thread(self._step_loop.leave_for_good)
        ended = await asyncio.to_thread(self._thread.close, timeout_s)
        self._rendezvous.clear()
        return ended

    def _run_epoch(self, membership: Membership, global_rank: int, on_joined: Callable[[], None]) -> None:
        """The step thread's."""

        def settle(on_one_host: bool) -> None:
            self._model.share_cores(on_one_host)
            if on_one_host:
                pin_threads(self._spec, Role.ATTENTION, global_rank, team_shrinks=not self._model.is_compiled)
            on_joined()

        use_threads(self._spec, Role.ATTENTION)
        self._step_loop.run_epoch(membership, global_rank, settle)

    def _cross(self, events: StepEvents) -> None:
        """From the step thread: one message per step for all streams."""
        self._loop.call_soon_threadsafe(self._deliver, events)

    def _deliver(self, events: StepEvents) -> None:
        for output in events.outputs:
            stream = self._streams.get(output.request_id)
            if stream is not None:
                stream.put(output)
        for rejection in events.rejections:
            stream = self._streams.get(rejection.request_id)
            if stream is not None:
                stream.put(rejection.error)

    def _epoch_ended(self, end: EpochEnd) -> None:
        """From the step thread, after each epoch."""
        self._loop.call_soon_threadsafe(self._await_next_epoch, end)
        self._on_epoch_end(end)

    def _join_done(self, joined: "Future[None]") -> None:
        """From the step thread."""
        # A join that failed must not give the requests another deadline.
        if not joined.cancelled() and joined.exception() is None:
            self._loop.call_soon_threadsafe(self._found)

    def _found(self) -> None:
        """An epoch is joined: requests are computed again."""
        if self._closing:
            return
        self._lost = None
        if self._give_up is not None:
            self._give_up.cancel()
            self._give_up = None

    def _await_next_epoch(self, end: EpochEnd) -> None:
        if end.is_fault:
            # A fault of this rank would come again with the same requests: they must not take the cell down for ever.
            self._fail_all("a step failed on this replica; its log has the cause")
        if self._give_up is None and self._lost is None:
            error = (
                f"epoch {end.epoch} ended and no other followed within {self._rejoin_timeout_s:g} s; "
                "send the request again"
            )
            self._give_up = self._loop.call_later(self._rejoin_timeout_s, self._lose, error)

    def _lose(self, error: str) -> None:
        self._give_up, self._lost = None, error
        self._fail_all(error)

    def _fail_all(self, error: str) -> None:
        if self._streams:
            log_event(logger, "requests failed", logging.ERROR, count=len(self._streams), error=error)
        for request_id, stream in self._streams.items():
            # An exception of its own for each: raised, it holds the frames of whoever it was raised to.
            stream.put(UnavailableError(error))
            self._step_loop.cancel(request_id)


class _Stream:
    """Where the outputs of one running request go."""

    def __init__(self, on_output: OnOutput) -> None:
        self._on_output = on_output
        self.ended = False

    def put(self, output: StepOutput | ShoalError) -> None:
        if self.ended:
            return  # it has been failed, and an output of the step under way comes behind
        self.ended = isinstance(output, ShoalError) or output.finish_reason is not None
        self._on_output(output)
