"""The gateway as a plain class: a request in, a stream of events out, whatever the wire and wherever the engine."""

import asyncio
import secrets
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cluster.request import GenerationRequest
from deploy.gateway import validation
from deploy.gateway.engine_client import EngineClient
from deploy.gateway.generation import Generation
from deploy.gateway.validation import ModelLimits, SamplingFields
from deploy.text import ChatTokenizer, IncrementalDetokenizer
from deploy.text.messages import ChatMessage
from model_shards.errors import OverloadedError, UnavailableError

RETRY_AFTER_S = 1.0


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

    async def complete(self, model: str, prompt: str | Sequence[int], fields: SamplingFields) -> Generation:
        """Accepts a completion, or raises what is wrong with it. The caller closes what it gets."""
        validation.check_model(model, self.model)
        if isinstance(prompt, str):
            text = prompt
            validation.check_text("prompt", text, self.model)
            return await self._accept(
                "cmpl", lambda: self.tokenizer.encode(text), fields, validation.DEFAULT_COMPLETION_TOKENS
            )
        ids = list(prompt)
        validation.check_token_ids(ids, self.model)
        return await self._accept("cmpl", lambda: ids, fields, validation.DEFAULT_COMPLETION_TOKENS)

    async def chat(self, model: str, messages: Sequence[ChatMessage], fields: SamplingFields) -> Generation:
        """Accepts a conversation, or raises what is wrong with it. The caller closes what it gets."""
        validation.check_model(model, self.model)
        validation.check_messages(messages, self.model)
        return await self._accept("chatcmpl", lambda: self.tokenizer.render_chat(messages), fields, None)

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

    async def _accept(
        self, prefix: str, tokenize: Callable[[], list[int]], fields: SamplingFields, default: int | None
    ) -> Generation:
        sampling = validation.sampling_params(fields, secrets.randbits(64))
        request_id = f"{prefix}-{uuid.uuid4().hex}"
        self._admit(request_id)
        try:
            # In a thread: a long prompt takes so long that all other streams would stand still.
            ids = await asyncio.to_thread(tokenize)
            request = GenerationRequest(
                request_id=request_id,
                prompt_token_ids=tuple(ids),
                max_tokens=validation.resolve_max_tokens(len(ids), fields, default, self.model),
                sampling=sampling,
                eos_token_ids=self.tokenizer.eos_token_ids,
                ignore_eos=fields.ignore_eos,
            )
            return Generation(
                request,
                IncrementalDetokenizer(self.tokenizer, fields.stop),
                self._engine,
                self._limits.request_timeout_s,
                on_end=lambda: self._release(request_id),
            )
        except BaseException:
            self._release(request_id)
            raise

    def _admit(self, request_id: str) -> None:
        if self._draining:
            raise UnavailableError("the service is draining; send the request to another gateway")
        if len(self._running) >= self._limits.max_concurrent_requests:
            raise OverloadedError(
                f"this gateway takes {self._limits.max_concurrent_requests} requests at once and has them; "
                f"try again in {RETRY_AFTER_S:g} s",
                RETRY_AFTER_S,
            )
        self._running.add(request_id)
        self._quiet.clear()

    def _release(self, request_id: str) -> None:
        self._running.discard(request_id)
        if not self._running:
            self._quiet.set()
