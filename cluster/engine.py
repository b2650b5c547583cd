"""The engine of an attention replica: schedule -> run -> commit (or abandon), one step at a time, in one thread.

While a step runs the next one is laid out, where what it holds can be foreseen (`cluster.ahead`).

A step is idempotent until it is committed: `schedule` advances nothing, blocks stay with their sequences, so a step
that is scheduled again writes the same tokens to the same slots, and sampling draws from (seed, position).
"""

import time
from collections.abc import Callable, Generator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Protocol

import torch

from cluster.ahead import PreparedStep, prepare_step
from cluster.batch_builder import build_batch
from cluster.limits import EngineLimits, check_request
from cluster.micro_batches import MicroBatchChooser, StepKind, kind_of
from cluster.prefill_budget import NOTHING_ELSEWHERE, Elsewhere, PrefillBudget
from cluster.request import NO_STEPS, FinishReason, GenerationRequest, ReplicaLoad, StepOutput, TokenLogprob
from cluster.scheduler import ScheduledChunk, Scheduler, split_micro_batches
from cluster.sequence import Sequence
from cluster.step_work import context_worth_a_token, mean_context, work_of
from model_shards.batch import AttentionBatch
from model_shards.config import ModelConfig
from model_shards.errors import ConfigError, InvalidRequestError
from model_shards.kv_cache import LatentKVCache
from model_shards.pipeline import run_micro_batches
from model_shards.routed import RoutedExperts
from model_shards.sampler import NO_TOKEN, SampledToken, SamplingRow, TokenStatistics, has_penalty, sample


class StepModel(Protocol):
    """The part of `model_shards.model.AttentionModel` that the engine calls."""

    def forward_steps(
        self, batch: AttentionBatch, kv_cache: LatentKVCache, routed: RoutedExperts
    ) -> Generator[None, None, torch.Tensor]:
        """One micro-batch; yields once per MoE layer, returns logits [R, V] float32."""
        ...


# A step that is lost this often, without one that succeeds in between, is lost because of what it computes.
_MAX_ATTEMPTS = 3


@dataclass(frozen=True)
class ScheduledStep:
    """One step, not yet committed."""

    chunks: tuple[ScheduledChunk, ...]  # at most one per sequence
    micro_batches: tuple[AttentionBatch, ...]  # exactly num_micro_batches, some possibly empty
    sampled: tuple[Sequence, ...]  # whose next token each row of logits gives, micro-batch by micro-batch
    allowed_prefill: int | None = None  # prefill tokens of the cell that this replica's decodes bear; None: any number
    has_prefill: bool = False  # whether there are prompts to compute, in this step or a later one

    @property
    def num_filled(self) -> int:
        """Micro-batches with a token."""
        return sum(batch.num_tokens > 0 for batch in self.micro_batches)

    @property
    def num_tokens(self) -> int:
        """Tokens of all micro-batches."""
        return _num_tokens(self.chunks)

    @property
    def num_prefill_tokens(self) -> int:
        """Those that are no decodes."""
        return sum(chunk.num_tokens for chunk in self.chunks if not chunk.is_decode)


@dataclass(frozen=True)
class SampledStep:
    """What a step's rows of logits gave, in the order of `ScheduledStep.sampled`."""

    tokens: tuple[SampledToken, ...]
    seconds: float  # that the step took to run
    waited_s: float | None = None  # of these for what the experts send back; None: it cannot be told


class Engine:
    """Continuous batching over one model and one cache. Not thread-safe: one thread owns it."""

    def __init__(
        self,
        config: ModelConfig,
        model: StepModel,
        kv_cache: LatentKVCache,
        limits: EngineLimits,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if (kv_cache.num_blocks, kv_cache.block_size) != (limits.num_blocks, limits.block_size):
            raise ConfigError(
                f"the limits say {limits.num_blocks} blocks of {limits.block_size} tokens, "
                f"the cache has {kv_cache.num_blocks} of {kv_cache.block_size}"
            )
        self._vocab_size = config.vocab_size
        self._context_worth = context_worth_a_token(config)
        self._model = model
        self._kv_cache = kv_cache
        self._device = kv_cache.data.device
        self._limits = limits
        self._empty = build_batch((), limits.block_size, self._device)
        self._clock = clock
        self._scheduler = Scheduler(limits)
        self._chooser = MicroBatchChooser(limits.num_micro_batches) if limits.choose_micro_batches else None
        slowdown = limits.max_decode_slowdown
        self._prefill_budget = None if slowdown is None else PrefillBudget(slowdown)
        self._sequences: dict[str, Sequence] = {}
        self._statistics: dict[Sequence, TokenStatistics] = {}
        self._in_flight: ScheduledStep | None = None
        self._prepared: PreparedStep | None = None  # newer than the last `schedule`
        self._cancelled: list[Sequence] = []  # cancelled while their step was under way
        self._num_steps = 0
        self._last_sampled: SampledStep | None = None  # of the step committed last, until `experts_took`
        self._times = NO_STEPS

    def add(self, request: GenerationRequest) -> None:
        """Queues a request. Raises InvalidRequestError, with the numbers, when it can never be generated here."""
        check_request(request, self._limits, self._vocab_size)
        if request.request_id in self._sequences:
            raise InvalidRequestError(f"request id {request.request_id} is already running")
        sequence = Sequence(request)
        self._sequences[request.request_id] = sequence
        self._scheduler.add(sequence)

    def cancel(self, request_id: str) -> None:
        """Ends a request without output; an unknown id is no error.

        Its blocks are free at once, or at the end of the step that is under way if that step writes to them.
        """
        sequence = self._sequences.pop(request_id, None)
        if sequence is None:
            return
        if self._in_flight is not None and any(chunk.sequence is sequence for chunk in self._in_flight.chunks):
            self._cancelled.append(sequence)
        else:
            self._end(sequence)

    def has_work(self) -> bool:
        """Whether a request waits or runs."""
        return bool(self._sequences)

    def schedule(self, elsewhere: Elsewhere = NOTHING_ELSEWHERE) -> ScheduledStep:
        """The next step; with no work it has 0 tokens and still takes part in every exchange when run.

        `elsewhere` is what the other replicas told of the last one: it bounds the prefill tokens of this one.
        The step must be committed or abandoned before the next one is scheduled.
        """
        assert self._in_flight is None, "the last step was neither committed nor abandoned"
        prepared, self._prepared = self._prepared, None
        if prepared is not None and self._scheduler.take(prepared.foreseen):
            chunks, has_prefill = prepared.foreseen.chunks, self._scheduler.num_waiting > 0
        else:
            prepared, has_prefill = None, self._scheduler.has_prefill
            chunks = self._scheduler.schedule(lambda decodes: elsewhere.share_of(self._allowed_prefill(decodes)))
        most = self._limits.num_micro_batches
        kind = _kind_of(chunks)
        count = most if self._chooser is None or kind is None else self._chooser.choose(kind, _num_tokens(chunks))
        if prepared is not None and len(prepared.micro_batches) == min(count, len(chunks)):
            batches, sampled = prepared.batches(self._device), prepared.sampled
        else:
            parts = split_micro_batches(chunks, count)
            batches = tuple(build_batch(part, self._limits.block_size, self._device) for part in parts)
            sampled = tuple(chunk.sequence for part in parts for chunk in part if chunk.wants_logits)
        step = ScheduledStep(
            chunks=chunks,
            # All ranks count with the same number: those not chosen are empty.
            micro_batches=batches + (self._empty,) * (most - len(batches)),
            sampled=sampled,
            allowed_prefill=self._allowed_prefill(sum(chunk.is_decode for chunk in chunks)),
            has_prefill=has_prefill,
        )
        self._in_flight = step
        return step

    def run(self, step: ScheduledStep, routed: SequenceOf[RoutedExperts | None]) -> SampledStep:
        """Computes the step, `routed[i]` standing for the experts of micro-batch i; changes nothing but the cache.

        None stands for a micro-batch without a token on any rank, which is not computed at all; one must have some.
        While their tokens are away the next step is prepared.

        Raises EpochAbortedError when an exchange failed; the step may then be abandoned and scheduled again.
        """
        begun = self._clock()
        # Outside inference mode: what a row keeps from step to step is changed outside it, too.
        rows = [self._row(sequence) for sequence in step.sampled]
        with torch.inference_mode():
            steps = [
                self._model.forward_steps(batch, self._kv_cache, experts)
                for batch, experts in zip(step.micro_batches, routed, strict=True)
                if experts is not None
            ]
            parts = run_micro_batches(steps, meanwhile=lambda: self._prepare_behind(step))
            logits = parts[0] if len(parts) == 1 else torch.cat(parts)  # [R, V]
            tokens = sample(logits, rows)
        return SampledStep(tokens, self._clock() - begun)

    def commit(
        self, step: ScheduledStep, sampled: SampledStep, elsewhere: Elsewhere = NOTHING_ELSEWHERE
    ) -> list[StepOutput]:
        """Makes the step's result final: one output per sequence that got a token and was not cancelled meanwhile.

        `elsewhere` is what the other replicas told of this step.
        """
        assert self._in_flight is step, "only the step that was scheduled last can be committed"
        self._in_flight = None
        self._num_steps += 1
        kind = _kind_of(step.chunks)
        if self._chooser is not None and kind is not None:
            work = work_of(step.chunks, self._context_worth)
            self._chooser.observe(kind, work, step.num_filled, sampled.seconds, sampled.waited_s)
        self._last_sampled = sampled if step.chunks else None  # what others computed is no part of its own times
        if self._prefill_budget is not None and step.chunks:
            num_decodes = step.num_tokens - step.num_prefill_tokens
            self._prefill_budget.observe(num_decodes, step.num_prefill_tokens, sampled.seconds, elsewhere)
        self._scheduler.commit(step.chunks)
        for chunk in step.chunks:
            chunk.sequence.num_lost_steps = 0
        for sequence, token in zip(step.sampled, sampled.tokens, strict=True):
            if token.token_id == NO_TOKEN:
                # What is not finite may be in its blocks, and would fail all that took them.
                self._scheduler.forget(sequence)
        outputs = [
            self._commit_token(sequence, token)
            for sequence, token in zip(step.sampled, sampled.tokens, strict=True)
            if sequence not in self._cancelled
        ]
        self._end_cancelled()
        return outputs

    def experts_took(self, seconds: float | None) -> None:
        """What the slowest expert rank computed in the step committed last, as told after it; None: it is not known."""
        last, self._last_sampled = self._last_sampled, None
        if last is not None and last.waited_s is not None and seconds is not None:
            self._times = self._times.after(last.seconds, last.waited_s, seconds)
        if self._chooser is not None:
            self._chooser.experts_took(seconds)

    def abandon(self, step: ScheduledStep) -> None:
        """Forgets a step that will not be committed; the next `schedule` builds it again. Twice is no error."""
        if self._in_flight is step:
            self._in_flight = None
            self._end_cancelled()

    def abort(self, step: ScheduledStep) -> list[StepOutput]:
        """Forgets a step that was lost while it ran: a rank died, or did not answer. Counts it against its requests.

        One that was lost with too often ends here, with an error: a request that kills a rank whenever it is computed
        must not take the cell down for ever. The others are in the next `schedule` again.
        """
        self.abandon(step)
        outputs: list[StepOutput] = []
        for sequence in dict.fromkeys(chunk.sequence for chunk in step.chunks):
            sequence.num_lost_steps += 1
            if sequence.num_lost_steps >= _MAX_ATTEMPTS and sequence.request.request_id in self._sequences:
                error = f"the cell lost a rank in each of {_MAX_ATTEMPTS} attempts to compute this request's next token"
                outputs.append(self._fail(sequence, error))
        return outputs

    def load(self) -> ReplicaLoad:
        """Queues, blocks and counters as they stand now."""
        return ReplicaLoad(
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting,
            num_blocks=self._limits.num_blocks,
            num_free_blocks=self._scheduler.num_free_blocks,
            num_preemptions=self._scheduler.num_preemptions,
            num_steps=self._num_steps,
            num_cached_tokens=self._scheduler.num_cached_tokens,
            times=self._times,
        )

    def check_integrity(self) -> None:
        """Raises AssertionError when the engine's parts contradict each other."""
        self._scheduler.check_integrity()
        known = {*self._sequences.values(), *self._cancelled}
        assert len(known) == self._scheduler.num_waiting + self._scheduler.num_running, "a sequence is lost"
        assert self._statistics.keys() <= known, "statistics of a sequence that ended"
        assert self._in_flight is not None or not self._cancelled, "a cancelled sequence outlived its step"

    def _prepare_behind(self, step: ScheduledStep) -> None:
        # As many micro-batches as this step has: what is chosen for the next one is known when this one was measured.
        self._prepared = prepare_step(self._scheduler, step.chunks, step.num_filled, self._limits.block_size)

    def _allowed_prefill(self, num_decodes: int) -> int | None:
        return None if self._prefill_budget is None else self._prefill_budget.allowed(num_decodes)

    def _row(self, sequence: Sequence) -> SamplingRow:
        if sequence not in self._statistics and has_penalty(sequence.request.sampling):
            # Not before its first sample: a waiting request must not take device memory.
            prompt = sequence.request.prompt_token_ids
            output = sequence.token_ids[len(prompt) :]
            self._statistics[sequence] = TokenStatistics(self._vocab_size, prompt, output, self._device)
        return SamplingRow(
            sequence.request.sampling, sequence.seed, sequence.num_tokens, self._statistics.get(sequence)
        )

    def _fail(self, sequence: Sequence, error: str) -> StepOutput:
        del self._sequences[sequence.request.request_id]
        self._end(sequence)
        return StepOutput(sequence.request.request_id, (), FinishReason.ERROR, error=error)

    def _commit_token(self, sequence: Sequence, token: SampledToken) -> StepOutput:
        if token.token_id == NO_TOKEN:
            return self._fail(sequence, f"the model's logits are not finite at position {sequence.num_tokens}")
        finish_reason: FinishReason | None = sequence.append(token.token_id)
        if finish_reason is not None:
            del self._sequences[sequence.request.request_id]
            self._end(sequence)
        elif sequence in self._statistics:
            self._statistics[sequence].record(token.token_id)
        logprobs = () if token.logprob is None else (TokenLogprob(token.logprob, token.top),)
        return StepOutput(
            sequence.request.request_id,
            (token.token_id,),
            finish_reason,
            logprobs,
            num_cached_tokens=sequence.num_cached_tokens or 0,
        )

    def _end(self, sequence: Sequence) -> None:
        self._statistics.pop(sequence, None)
        self._scheduler.remove(sequence)

    def _end_cancelled(self) -> None:
        for sequence in self._cancelled:
            self._end(sequence)
        self._cancelled.clear()


def _num_tokens(chunks: SequenceOf[ScheduledChunk]) -> int:
    return sum(chunk.num_tokens for chunk in chunks)


def _kind_of(chunks: SequenceOf[ScheduledChunk]) -> StepKind | None:
    """None without a token."""
    if not chunks:
        return None
    has_prefill = any(not chunk.is_decode for chunk in chunks)
    return kind_of(_num_tokens(chunks), has_prefill, mean_context(chunks))
