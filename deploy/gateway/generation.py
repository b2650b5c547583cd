"""One accepted request: the engine's outputs become text and events, and its end is told exactly once."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Self

from cluster.logs import log_event
from cluster.request import FinishReason, GenerationRequest, StepOutput, TokenLogprob
from deploy.gateway.engine_client import EngineClient
from deploy.text import IncrementalDetokenizer
from model_shards.errors import DeadlineError, FailedRequestError, UnavailableError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Usage:
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0  # of the prompt, that were not computed

    @property
    def total_tokens(self) -> int:
        """The sum of both."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class GenerationEvent:
    """What one step adds to a choice, whose last event has a finish reason; the last of the request has the usage."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    text_offsets: tuple[int, ...] = ()  # of each token: characters of the choice's text before it
    index: int = 0  # of the choice


class Generation:
    """An accepted request. Iterating runs it; whoever got it closes it, iterated or not.

    It ends exactly once, be it finished, failed, out of time or left by the client; `on_end` is called then. The
    engine's stream is closed before that, which is what cancels the request there.
    """

    def __init__(
        self,
        request: GenerationRequest,
        detokenizer: IncrementalDetokenizer,
        engine: EngineClient,
        timeout_s: float,
        on_end: Callable[[], None],
        log_id: str,
    ) -> None:
        self.id = request.request_id
        self.log_id = log_id  # the client's own name of the request, or its id if it has none
        self.left_as = "left by the client"  # the ending to tell when it is closed while it runs
        self.created = int(time.time())  # seconds since 1970
        self._request = request
        self._detokenizer = detokenizer
        self._engine = engine
        self._timeout_s = timeout_s
        self._deadline = asyncio.get_running_loop().time() + timeout_s
        self._on_end = on_end
        self._num_generated = 0
        self._num_cached = 0
        self._ended = False
        self._events = self._run()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> GenerationEvent:
        """Raises DeadlineError when time is up, UnavailableError when the engine is lost."""
        return await anext(self._events)

    async def aclose(self) -> None:
        """Ends the request if it still runs."""
        try:
            await self._events.aclose()
        finally:
            self._end(self.left_as)

    async def _run(self) -> AsyncGenerator[GenerationEvent, None]:
        try:
            async with aclosing(self._engine.generate(self._request)) as outputs:
                while (event := self._event(await self._next(outputs))).finish_reason is None:
                    yield event
            self._end(event.finish_reason.value)
            yield event
        except Exception as error:
            self._end(type(error).__name__)
            raise
        finally:
            self._end(self.left_as)

    async def _next(self, outputs: AsyncGenerator[StepOutput, None]) -> StepOutput:
        late = DeadlineError(f"request {self.id} did not finish within {self._timeout_s:g} s")
        # A timeout only cuts a wait short: where outputs wait for a slow consumer there is none to cut.
        if asyncio.get_running_loop().time() >= self._deadline:
            raise late
        try:
            async with asyncio.timeout_at(self._deadline) as scope:
                return await anext(outputs)
        except StopAsyncIteration:
            raise UnavailableError(f"the engine lost request {self.id}; send it again") from None
        except TimeoutError:
            if not scope.expired():
                raise
            raise late from None

    def _event(self, output: StepOutput) -> GenerationEvent:
        """One engine output as text; a stop string ends the answer as an end-of-sequence token does."""
        if output.finish_reason is FinishReason.ERROR:
            raise FailedRequestError(output.error or "the engine ended the request with an error")
        text, taken, stopped = "", 0, False
        offsets: list[int] = []
        # One by one: an output may hold many tokens, and those behind a stop string are not part of the answer.
        while taken < len(output.token_ids) and not stopped:
            offsets.append(self._detokenizer.num_characters)
            delta = self._detokenizer.push(output.token_ids[taken : taken + 1])
            text, taken, stopped = text + delta.text, taken + 1, delta.stopped
        reason = output.finish_reason
        if stopped or reason is not None:
            last = self._detokenizer.finish()
            text += last.text
            reason = FinishReason.STOP if stopped or last.stopped else reason
        self._num_generated += taken
        self._num_cached = output.num_cached_tokens
        usage = None
        if reason is not None:
            usage = Usage(len(self._request.prompt_token_ids), self._num_generated, self._num_cached)
        return GenerationEvent(text, output.token_ids[:taken], reason, usage, output.logprobs[:taken], tuple(offsets))

    def _end(self, ending: str) -> None:
        if self._ended:
            return
        self._ended = True
        log_event(
            logger,
            "request ended",
            request_id=self.id,
            x_request_id=self.log_id,
            ending=ending,
            prompt_tokens=len(self._request.prompt_token_ids),
            completion_tokens=self._num_generated,
            cached_tokens=self._num_cached,
        )
        self._on_end()
