"""A gateway over an engine that answers from a script, and the two wires in front of it."""

import asyncio
import contextlib
import functools
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

import grpc
from grpc_health.v1 import health_pb2_grpc

from cluster.request import FinishReason, GenerationRequest, StepOutput, TokenLogprob
from deploy.gateway import inference_pb2_grpc as pb_grpc
from deploy.gateway.grpc_methods import InferenceServicer, RpcError
from deploy.gateway.service import Gateway, GatewayLimits
from deploy.gateway.validation import ModelLimits
from deploy.models import default_model_directory
from deploy.text import ChatTokenizer

TEST_S = 20.0
ENDING_TURNS = 200  # of the event loop, in which tasks end that are about to
MODEL = "shoal-demo"
MAX_MODEL_LEN = 128


def on_event_loop(test: Callable[..., Coroutine[None, None, None]]) -> Callable[..., None]:
    """Makes an async test a plain one that ends in time and leaves no task behind."""

    @functools.wraps(test)
    def run(*arguments, **named):
        async def main():
            async with asyncio.timeout(TEST_S):
                await test(*arguments, **named)
            # What is about to end may: grpc's own tasks of a call outlive it by some turns of the loop.
            for _ in range(ENDING_TURNS):
                await asyncio.sleep(0)
            left = asyncio.all_tasks() - {asyncio.current_task()}
            assert not left, f"still running: {left}"

        asyncio.run(main())

    return run


@functools.cache
def tokenizer() -> ChatTokenizer:
    """The embedded checkpoint's."""
    return ChatTokenizer.load(default_model_directory())


def tokens_of(text: str) -> list[int]:
    """What an engine generates to say `text`."""
    ids = tokenizer().encode(text)[1:]  # without the first token of a prompt
    assert tokenizer().decode(ids) == text
    return ids


def steps_of(text: str) -> list[tuple[int, ...]]:
    """`text`, one token a step."""
    return [(token,) for token in tokens_of(text)]


@dataclass
class ScriptedEngine:
    """Answers every request with the same steps. Keeps an account of the streams that are open."""

    steps: Sequence[tuple[int, ...]] = field(default_factory=lambda: steps_of("Whales are large."))
    finish_reason: FinishReason | None = FinishReason.LENGTH  # of the last step; None: the stream ends without
    holds: bool = False  # waits for ever where the last step would be
    error: Exception | None = None  # raised where the last step would be
    top: tuple[tuple[int, float], ...] | None = None  # log probabilities, if there are any
    num_cached: int = 0  # tokens of every prompt
    requests: list[GenerationRequest] = field(default_factory=list)
    num_open: int = 0
    num_steps: int = 0  # that were asked for
    opened: asyncio.Event = field(default_factory=asyncio.Event)
    holding: asyncio.Event = field(default_factory=asyncio.Event)
    closed: asyncio.Event = field(default_factory=asyncio.Event)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[StepOutput, None]:
        """An EngineClient's."""
        self.requests.append(request)
        self.num_open += 1
        self.opened.set()
        try:
            for index, ids in enumerate(self.steps):
                self.num_steps += 1
                if index == len(self.steps) - 1:
                    if self.holds:
                        self.holding.set()
                        await asyncio.Event().wait()
                    if self.error is not None:
                        raise self.error
                    yield self._output(request, ids, self.finish_reason)
                else:
                    yield self._output(request, ids, None)
                await asyncio.sleep(0)
        finally:
            self.num_open -= 1
            self.closed.set()

    def _output(self, request: GenerationRequest, ids: tuple[int, ...], reason: FinishReason | None) -> StepOutput:
        logprobs = () if self.top is None else tuple(TokenLogprob(-0.5, self.top) for _ in ids)
        error = "the script says so" if reason is FinishReason.ERROR else None
        return StepOutput(request.request_id, ids, reason, logprobs, error, self.num_cached)


def make_gateway(engine: ScriptedEngine, max_requests: int = 4, timeout_s: float = TEST_S) -> Gateway:
    """A gateway with the embedded checkpoint's tokenizer and a short context."""
    model = ModelLimits(MODEL, tokenizer().vocab_size, MAX_MODEL_LEN)
    return Gateway(tokenizer(), model, GatewayLimits(max_requests, timeout_s), engine)


class _ServeContext:
    """What a method gets under Serve: its settings reach the client with the next chunk, or with the error."""

    def __init__(self, metadata: Sequence[tuple[str, str]]) -> None:
        self._metadata = list(metadata)
        self.code: grpc.StatusCode | None = None
        self.details = ""
        self.trailing_metadata: list[tuple[str, str]] = []

    def invocation_metadata(self) -> list[tuple[str, str]]:
        return self._metadata

    def set_code(self, code: grpc.StatusCode) -> None:
        self.code = code

    def set_details(self, details: str) -> None:
        self.details = details

    def set_trailing_metadata(self, trailing_metadata: list[tuple[str, str]]) -> None:
        self.trailing_metadata = trailing_metadata


class _Methods(pb_grpc.InferenceServicer, health_pb2_grpc.HealthServicer):
    """The gateway's methods behind a gRPC server as Serve's proxy calls them."""

    def __init__(self, gateway: Gateway) -> None:
        self._servicer = InferenceServicer(gateway)

    async def ChatCompletion(self, request, context):
        async with aclosing(_streamed(self._servicer.chat_completion, request, context)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def Completion(self, request, context):
        async with aclosing(_streamed(self._servicer.completion, request, context)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def ListModels(self, request, context):
        return await _answered(self._servicer.list_models, request, context)

    async def Tokenize(self, request, context):
        return await _answered(self._servicer.tokenize, request, context)

    async def Detokenize(self, request, context):
        return await _answered(self._servicer.detokenize, request, context)

    async def Check(self, request, context):
        return await _answered(self._servicer.check, request, context)


async def _streamed(method, request, context):
    serve = _ServeContext(context.invocation_metadata() or ())
    try:
        async with aclosing(method(request, serve)) as chunks:
            async for chunk in chunks:
                if serve.code is not None:
                    context.set_code(serve.code)
                    context.set_details(serve.details)
                context.set_trailing_metadata(serve.trailing_metadata)
                yield chunk
    except RpcError:
        await context.abort(serve.code, serve.details)


async def _answered(method, request, context):
    serve = _ServeContext(context.invocation_metadata() or ())
    try:
        return await method(request, serve)
    except RpcError:
        await context.abort(serve.code, serve.details)


@contextlib.asynccontextmanager
async def grpc_channel(gateway: Gateway) -> AsyncIterator[grpc.aio.Channel]:
    """A channel to `gateway` over loopback."""
    server = grpc.aio.server()
    methods = _Methods(gateway)
    pb_grpc.add_InferenceServicer_to_server(methods, server)
    health_pb2_grpc.add_HealthServicer_to_server(methods, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield channel
    finally:
        await server.stop(0)
