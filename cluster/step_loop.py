"""The step loop of an attention rank: inbox -> schedule -> agree -> run -> commit -> outbox, in one plain thread."""

import logging
import queue
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from cluster.dispatch import make_attention_dispatcher
from cluster.dispatch.base import AttentionDispatcher
from cluster.engine import Engine, ScheduledStep
from cluster.epoch_session import EpochSession, LeaveFlag, open_session
from cluster.logs import log_event
from cluster.membership import Membership
from cluster.prefill_budget import NOTHING_ELSEWHERE
from cluster.request import GenerationRequest, ReplicaLoad, StepOutput
from cluster.step_header import AgreedStep, StepHeader
from model_shards.config import ModelConfig
from model_shards.errors import EpochAbortedError, ShoalError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rejection:
    """A request that the engine refused at its door."""

    request_id: str
    error: ShoalError


@dataclass(frozen=True)
class StepEvents:
    """All that one step has to say to the front end; crosses in one message."""

    outputs: tuple[StepOutput, ...]
    rejections: tuple[Rejection, ...]


OnEvents = Callable[[StepEvents], None]


class StepLoop:
    """Owns the engine. `submit`, `cancel`, `leave` are for any thread; `run_epoch` is the step thread's."""

    def __init__(
        self,
        engine: Engine,
        config: ModelConfig,
        dtype: torch.dtype,
        device: torch.device,
        num_micro_batches: int,
        on_events: OnEvents,
        trace_directory: str | None = None,
    ) -> None:
        self._engine = engine
        self._config = config
        self._dtype = dtype
        self._device = device
        self._num_micro_batches = num_micro_batches
        self._on_events = on_events
        self._trace_directory = trace_directory
        self._inbox: queue.SimpleQueue[GenerationRequest | str] = queue.SimpleQueue()
        self._leave = LeaveFlag()
        self._ring: Callable[[], None] | None = None
        self._load = engine.load()
        self._elsewhere = NOTHING_ELSEWHERE  # as of the last step header

    def submit(self, request: GenerationRequest) -> None:
        """Hands a request to the engine at the next step boundary."""
        self._inbox.put(request)
        self._wake()

    def cancel(self, request_id: str) -> None:
        """Frees a request's blocks at the next step boundary; an unknown id is no error."""
        self._inbox.put(request_id)
        self._wake()

    def leave(self, epoch: int) -> None:
        """Ends this epoch at its next step boundary, or at once while it is joined."""
        self._leave.ask(epoch)

    def leave_for_good(self) -> None:
        """Ends the epoch of now, and every later one as soon as it is joined."""
        self._leave.ask_for_good()

    def load(self) -> ReplicaLoad:
        """Load as of the last step boundary."""
        return self._load

    def run_epoch(self, membership: Membership, global_rank: int, on_joined: Callable[[bool], None]) -> None:
        """Joins the epoch and steps until it ends. Raises EpochAbortedError; uncommitted work is then forgotten.

        `on_joined` is told whether all ranks are on this host.
        """
        num_moe_layers = len(self._config.moe_layers)
        self._elsewhere = NOTHING_ELSEWHERE
        with open_session(
            membership,
            global_rank,
            self._device,
            self._num_micro_batches,
            num_moe_layers,
            self._leave,
            self._trace_directory,
        ) as session:
            dispatcher = make_attention_dispatcher(
                session.groups, membership, global_rank, self._config, self._dtype, self._device, session.trace
            )
            self._ring = session.bell.ring
            try:
                on_joined(session.groups.mesh is not None)
                place = membership.topology.name(global_rank)
                log_event(logger, "epoch joined", epoch=membership.epoch, place=place)
                while not self._step(session, dispatcher, global_rank):
                    pass
            finally:
                self._ring = None

    def _step(self, session: EpochSession, dispatcher: AttentionDispatcher, global_rank: int) -> bool:
        """One step; whether the epoch ends here."""
        rejections = self._drain_inbox()
        if rejections:
            # At once: whether the step below succeeds is nothing to them.
            self._on_events(StepEvents((), tuple(rejections)))
        step = self._engine.schedule(self._elsewhere)
        try:
            tokens = tuple(batch.num_tokens for batch in step.micro_batches)
            header = StepHeader(
                session.membership.epoch,
                tokens,
                self._leave.asked(),
                step.num_prefill_tokens,
                step.has_prefill,
                step.allowed_prefill,
            )
            agreed = session.headers.exchange(header)
            self._engine.experts_took(agreed.experts_s)
            self._elsewhere = agreed.elsewhere(global_rank)
            outputs = self._run(step, agreed, dispatcher)
        except BaseException:
            self._engine.abandon(step)
            raise
        self._load = self._engine.load()
        if outputs:
            self._on_events(StepEvents(tuple(outputs), ()))
        if agreed.idle and not agreed.ends:
            session.bell.sleep(self._has_news)
        return agreed.ends

    def _run(self, step: ScheduledStep, agreed: AgreedStep, dispatcher: AttentionDispatcher) -> list[StepOutput]:
        if agreed.idle:
            self._engine.abandon(step)
            return []
        dispatcher.begin_step(agreed.plan)
        waited_s = dispatcher.waited_s
        routed = [dispatcher.routed(index) for index in range(self._num_micro_batches)]
        try:
            sampled = self._engine.run(step, routed)
        except EpochAbortedError:
            # At once: the next epoch may be long in coming, and is nothing to those that end here.
            failed = self._engine.abort(step)
            if failed:
                self._on_events(StepEvents(tuple(failed), ()))
            raise
        if waited_s is not None and dispatcher.waited_s is not None:
            sampled = replace(sampled, waited_s=dispatcher.waited_s - waited_s)
        return self._engine.commit(step, sampled, self._elsewhere)

    def _drain_inbox(self) -> list[Rejection]:
        rejections: list[Rejection] = []
        while True:
            try:
                item = self._inbox.get_nowait()
            except queue.Empty:
                return rejections
            if isinstance(item, str):
                self._engine.cancel(item)
                continue
            try:
                self._engine.add(item)
            except ShoalError as error:
                rejections.append(Rejection(item.request_id, error))

    def _has_news(self) -> bool:
        return not self._inbox.empty() or self._leave.asked() or self._engine.has_work()

    def _wake(self) -> None:
        # A local: the step thread may lower the attribute between the test and the call.
        ring = self._ring
        if ring is not None:
            ring()
