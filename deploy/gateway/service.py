"""The gateway as a plain class: a request in, a stream of events out, whatever the wire and wherever the engine."""

import asyncio
import contextlib
import logging
import secrets
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass

from cluster.logs import log_event
from cluster.request import FinishReason, GenerationRequest, StepOutput, TokenLogprob
from deploy.gateway import validation
from deploy.gateway.engine_client import EngineClient
from deploy.gateway.validation import ModelLimits, SamplingFields
from deploy.text import ChatTokenizer, IncrementalDetokenizer
from deploy.text.messages import ChatMessage
from model_shards.errors import DeadlineError, OverloadedError, UnavailableError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Usage:
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int

    @property
    def total_tokens(self) -> int:
        """The sum of both."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class GenerationEvent:
    """What one step adds to an answer; the last event has a finish reason and the usage."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Generation:
    """An accepted request: it passed every rule; iterating `events` runs it."""

    id: str
    model: str
    created: int  # seconds since 1970
    events: AsyncGenerator[GenerationEvent, None]


@dataclass(frozen=True)
class GatewayLimits:
    """How much one gateway takes."""

    max_concurrent_requests: int
    request_timeout_s: float  # for requests that bring no deadline


class Gateway:
    """Validates, renders, tokenizes, streams and detokenizes. Lives on one event loop."""

    def __init__(
        self, tokenizer: ChatTokenizer, model: ModelLimits, limits: GatewayLimits, engine: EngineClient
    ) -> None:
        self.tokenizer = tokenizer
        self.model = model
        self._limits = limits
        self._engine = engine
        self._running = 0
        self._draining = False
        self._quiet = asyncio.Event()
        self._quiet.set()

    def complete(
        self, model: str, prompt: str | Sequence[int], fields: SamplingFields, deadline_s: float | None = None
    ) -> Generation:
        """Accepts a completion, or raises what is wrong with it. `deadline_s`: seconds from now."""
        validation.check_model(model, self.model)
        if isinstance(prompt, str):
            validation.check_text("prompt", prompt, self.model)
            ids = self.tokenizer.encode(prompt)
        else:
            validation.check_token_ids(prompt, self.model)
            ids = list(prompt)
        return self._accept("cmpl", ids, fields, validation.DEFAULT_COMPLETION_TOKENS, deadline_s)

    def chat(
        self, model: str, messages: Sequence[ChatMessage], fields: SamplingFields, deadline_s: float | None = None
    ) -> Generation:
        """Accepts a conversation, or raises what is wrong with it. `deadline_s`: seconds from now."""
        validation.check_model(model, self.model)
        validation.check_messages(messages, self.model)
        return self._accept("chatcmpl", self.tokenizer.render_chat(messages), fields, None, deadline_s)

    def tokenize(self, model: str, text: str) -> list[int]:
        """Token ids of a text, as a completion would read it."""
        validation.check_model(model, self.model)
        validation.check_text("text", text, self.model)
        return self.tokenizer.encode(text)

    def detokenize(self, model: str, ids: Sequence[int]) -> str:
        """Text of token ids."""
        validation.check_model(model, self.model)
        validation.check_token_ids(ids, self.model)
        return self.tokenizer.decode(ids)

    @property
    def serving(self) -> bool:
        """Whether new requests are taken."""
        return not self._draining

    async def drain(self) -> None:
        """Refuses new requests from now on; returns when the running ones ended. The caller sets the deadline."""
        self._draining = True
        await self._quiet.wait()

    def _accept(
        self, prefix: str, ids: list[int], fields: SamplingFields, default: int | None, deadline_s: float | None
    ) -> Generation:
        max_tokens = validation.resolve_max_tokens(len(ids), fields, default, self.model)
        sampling = validation.sampling_params(fields, secrets.randbits(64))
        if self._draining:
            raise UnavailableError("the service is draining; send the request to another gateway")
        if self._running >= self._limits.max_concurrent_requests:
            raise OverloadedError(
                f"this gateway runs its most of {self._limits.max_concurrent_requests} requests; try again shortly"
            )
        request = GenerationRequest(
            request_id=f"{prefix}-{uuid.uuid4().hex}",
            prompt_token_ids=tuple(ids),
            max_tokens=max_tokens,
            sampling=sampling,
            eos_token_ids=tuple(self.tokenizer.eos_token_ids),
            ignore_eos=fields.ignore_eos,
        )
        timeout_s = self._limits.request_timeout_s if deadline_s is None else deadline_s
        events = self._events(request, fields.stop, time.monotonic() + timeout_s)
        return Generation(request.request_id, self.model.name, int(time.time()), events)

    async def _events(
        self, request: GenerationRequest, stop: tuple[str, ...], deadline: float
    ) -> AsyncGenerator[GenerationEvent, None]:
        self._running += 1
        self._quiet.clear()
        prompt, generated, ending = len(request.prompt_token_ids), 0, "left by the client"
        detokenizer = IncrementalDetokenizer(self.tokenizer, stop)
        outputs = self._engine.generate(request)
        try:
            async for output in _until(outputs, deadline, request.request_id):
                generated += len(output.token_ids)
                event = _event(output, detokenizer, prompt, generated)
                if event.finish_reason is not None:
                    ending = event.finish_reason.value
                    yield event
                    return
                yield event
        except Exception as error:
            ending = type(error).__name__
            raise
        finally:
            # Closing the engine's stream is what cancels the request there; it must happen however this one ends.
            close = getattr(outputs, "aclose", None)
            if close is not None:
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.shield(close())
            self._running -= 1
            if self._running == 0:
                self._quiet.set()
            log_event(
                logger,
                "request ended",
                request_id=request.request_id,
                ending=ending,
                prompt_tokens=prompt,
                completion_tokens=generated,
            )


def _event(output: StepOutput, detokenizer: IncrementalDetokenizer, prompt: int, generated: int) -> GenerationEvent:
    """One engine output as text; a stop string ends the answer as an end-of-sequence token does."""
    delta = detokenizer.push(output.token_ids)
    text, reason = delta.text, output.finish_reason
    if delta.stopped:
        reason = FinishReason.STOP
    elif reason is not None:
        last = detokenizer.finish()
        text += last.text
        if last.stopped:
            reason = FinishReason.STOP
    if reason is FinishReason.ERROR:
        raise UnavailableError(output.error or "the engine ended the request with an error")
    usage = None if reason is None else Usage(prompt, generated)
    return GenerationEvent(text, output.token_ids, reason, usage, output.logprobs)


async def _until(outputs: AsyncIterator[StepOutput], deadline: float, request_id: str) -> AsyncIterator[StepOutput]:
    """The same outputs; raises DeadlineError when the next one does not come in time."""
    while True:
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                output = await anext(outputs)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise DeadlineError(f"the deadline of request {request_id} passed before it finished") from None
        yield output
