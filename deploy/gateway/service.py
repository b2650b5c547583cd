"""The gateway as a plain class: a request in, a stream of events out, whatever the wire and wherever the engine."""

import asyncio
import secrets
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeAlias

from cluster.request import GenerationRequest
from deploy.gateway import validation
from deploy.gateway.choices import Accepted, Choices, choice_seed
from deploy.gateway.engine_client import EngineClient
from deploy.gateway.generation import Generation
from deploy.gateway.validation import ModelLimits, SamplingFields
from deploy.text import ChatTokenizer, IncrementalDetokenizer
from deploy.text.messages import ChatMessage
from model_shards.errors import InvalidRequestError, OverloadedError, UnavailableError

RETRY_AFTER_S = 1.0
# Of a request's text: a third of a millisecond, and hardly more than it costs to have a thread do it.
_AT_ONCE_CHARACTERS = 1000
_MESSAGE_CHARACTERS = 20  # that a template adds to each message
Prompt: TypeAlias = str | Sequence[int]


@dataclass(frozen=True)
class GatewayLimits:
    """How much one gateway takes."""

    max_concurrent_requests: int
    request_timeout_s: float  # the longest a request may take; the deadline of its client may end it sooner


class Gateway:
    """Validates, renders, tokenizes, streams and detokenizes. Lives on one event loop."""

    def __init__(
        self, tokenizer: ChatTokenizer, model: ModelLimits, limits: GatewayLimits, engine: EngineClient
    ) -> None:
        self.tokenizer = tokenizer
        self.model = model
        self._limits = limits
        self._engine = engine
        self._running: set[str] = set()
        self._draining = False
        self._quiet = asyncio.Event()
        self._quiet.set()

    async def complete(self, model: str, prompt: Prompt, fields: SamplingFields, x_request_id: str = "") -> Accepted:
        """Accepts a completion, or raises what is wrong with it. The caller closes what it gets.

        `x_request_id` is the client's own name of the request; it goes to the log.
        """
        return await self.complete_all(model, [prompt], fields, x_request_id)

    async def complete_all(
        self, model: str, prompts: Sequence[Prompt], fields: SamplingFields, x_request_id: str = ""
    ) -> Accepted:
        """The same for one prompt or more, at least one; all are accepted or none is."""
        validation.check_model(model, self.model)
        self._check_count(len(prompts))
        for index, prompt in enumerate(prompts):
            with _named(index, len(prompts)):
                if isinstance(prompt, str):
                    validation.check_text("prompt", prompt, self.model)
                else:
                    validation.check_token_ids(prompt, self.model)
        asked = _asked("cmpl", fields, validation.DEFAULT_COMPLETION_TOKENS, x_request_id)
        characters = sum(len(prompt) for prompt in prompts if isinstance(prompt, str))
        return await self._accept(asked, len(prompts), characters, lambda: [self._tokens(prompt) for prompt in prompts])

    async def chat(
        self, model: str, messages: Sequence[ChatMessage], fields: SamplingFields, x_request_id: str = ""
    ) -> Accepted:
        """Accepts a conversation, or raises what is wrong with it. The caller closes what it gets."""
        validation.check_model(model, self.model)
        validation.check_messages(messages, self.model)
        asked = _asked("chatcmpl", fields, None, x_request_id)
        characters = sum(len(message.content) + _MESSAGE_CHARACTERS for message in messages)
        return await self._accept(asked, 1, characters, lambda: [self.tokenizer.render_chat(messages)])

    async def tokenize(self, model: str, text: str) -> list[int]:
        """Token ids of a text, as a completion would read it."""
        validation.check_model(model, self.model)
        validation.check_text("text", text, self.model)
        return await asyncio.to_thread(self.tokenizer.encode, text)

    def detokenize(self, model: str, ids: Sequence[int]) -> str:
        """Text of token ids."""
        validation.check_model(model, self.model)
        validation.check_token_ids(ids, self.model)
        return self.tokenizer.decode(ids)

    @property
    def serving(self) -> bool:
        """Whether new requests are taken."""
        return not self._draining

    @property
    def num_running(self) -> int:
        """Requests that were accepted and have not ended."""
        return len(self._running)

    async def drain(self) -> None:
        """Refuses new requests from now on; returns when the running ones ended. The caller sets the deadline."""
        self._draining = True
        await self._quiet.wait()

    def _tokens(self, prompt: Prompt) -> list[int]:
        return self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)

    async def _accept(
        self, asked: "_Asked", num_prompts: int, characters: int, tokenize: Callable[[], list[list[int]]]
    ) -> Accepted:
        fields = asked.fields
        sampling = validation.sampling_params(fields)
        n = fields.n or 1
        num_choices = num_prompts * n
        seeds = _seeds(sampling.seed, n, num_prompts)
        names = [asked.request_id] if num_choices == 1 else [f"{asked.request_id}-{i}" for i in range(num_choices)]
        self._admit(names)
        try:
            # In a thread: a long prompt takes so long that all other streams would stand still.
            tokenized = tokenize() if characters <= _AT_ONCE_CHARACTERS else await asyncio.to_thread(tokenize)
            prompts = [tuple(ids) for ids in tokenized]
            most: list[int] = []
            for index, ids in enumerate(prompts):
                with _named(index, num_prompts):
                    most.append(validation.resolve_max_tokens(len(ids), fields, asked.max_tokens, self.model))
            generations = [
                self._generation(
                    GenerationRequest(
                        request_id=name,
                        prompt_token_ids=prompts[index // n],
                        max_tokens=most[index // n],
                        sampling=replace(sampling, seed=seed),
                        eos_token_ids=self.tokenizer.eos_token_ids,
                        ignore_eos=fields.ignore_eos,
                    ),
                    asked,
                )
                for index, (name, seed) in enumerate(zip(names, seeds, strict=True))
            ]
            if num_choices == 1:
                return generations[0]
            return Choices(asked.request_id, [len(ids) for ids in prompts], generations)
        except BaseException:
            for name in names:
                self._release(name)
            raise

    def _generation(self, request: GenerationRequest, asked: "_Asked") -> Generation:
        return Generation(
            request,
            IncrementalDetokenizer(self.tokenizer, asked.fields.stop),
            self._engine,
            self._limits.request_timeout_s,
            on_end=lambda: self._release(request.request_id),
            log_id=asked.log_id,
        )

    def _admit(self, names: Sequence[str]) -> None:
        """Takes a place for each of a request's choices, or none."""
        most = self._limits.max_concurrent_requests
        if self._draining:
            raise UnavailableError("the service is draining; send the request to another gateway")
        self._check_count(len(names))
        if len(self._running) + len(names) > most:
            raise OverloadedError(
                f"this gateway takes {most} requests at once and has {len(self._running)}; "
                f"try again in {RETRY_AFTER_S:g} s",
                RETRY_AFTER_S,
            )
        self._running.update(names)
        self._quiet.clear()

    def _check_count(self, choices: int) -> None:
        """More than could ever run at once is no overload: trying again would not help."""
        if choices == 0:
            raise InvalidRequestError("there must be at least one prompt, got none")
        most = max(1, self._limits.max_concurrent_requests)
        if choices > most:
            raise InvalidRequestError(f"prompts x n must be at most {most}, the requests at once, got {choices}")

    def _release(self, request_id: str) -> None:
        self._running.discard(request_id)
        if not self._running:
            self._quiet.set()


@dataclass(frozen=True)
class _Asked:
    """What the choices of a request have in common."""

    request_id: str
    log_id: str  # the client's own name of the request, or its id if it has none
    fields: SamplingFields
    max_tokens: int | None  # if the client sent none; None: what is left of the context


def _asked(prefix: str, fields: SamplingFields, max_tokens: int | None, x_request_id: str) -> _Asked:
    request_id = f"{prefix}-{uuid.uuid4().hex}"
    return _Asked(request_id, x_request_id or request_id, fields, max_tokens)


def _seeds(seed: int | None, n: int, num_prompts: int) -> list[int]:
    """Of each choice. A client's seed gives a prompt the answers that it has alone, whatever prompts come with it."""
    if seed is None:
        return [secrets.randbits(64) for _ in range(n * num_prompts)]
    return [choice_seed(seed, choice) for choice in range(n)] * num_prompts


@contextmanager
def _named(index: int, count: int) -> Iterator[None]:
    """Errors of one prompt of several say which one."""
    try:
        yield
    except InvalidRequestError as error:
        if count == 1:
            raise
        raise InvalidRequestError(f"prompt {index}: {error}") from None
