"""The five RPCs and the health check: protobuf to the gateway and back."""

import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Protocol, TypeVar

import grpc
from grpc_health.v1 import health_pb2

from cluster.request import FinishReason, TokenLogprob
from deploy.gateway import inference_pb2 as pb
from deploy.gateway.choices import Accepted
from deploy.gateway.generation import GenerationEvent, Usage
from deploy.gateway.service import Gateway
from deploy.gateway.status import Status, status_of
from deploy.gateway.validation import SamplingFields
from deploy.text.messages import ChatMessage
from model_shards.errors import InvalidRequestError

_FINISH_REASONS = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
}
_X_REQUEST_ID = "x-request-id"
_MAX_ID = 128  # characters that are kept of a client's
_HEALTH_SERVICES = ("", "shoal.v1.Inference")


class GrpcContext(Protocol):
    """What is used of Serve's RayServegRPCContext.

    A client's deadline is not among it: the proxy keeps it, and cancels the call when it passes.
    """

    def invocation_metadata(self) -> list[tuple[str, str]]: ...

    def set_code(self, code: grpc.StatusCode) -> None: ...

    def set_details(self, details: str) -> None: ...

    def set_trailing_metadata(self, trailing_metadata: list[tuple[str, str]]) -> None: ...


class RpcError(Exception):
    """Ends an RPC after its status was set on the context; Serve sends that status."""


Reply = TypeVar("Reply")


class InferenceServicer:
    """Methods in the order of inference.proto. Every error leaves with the status of `deploy.gateway.status`."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def chat_completion(
        self, request: pb.ChatCompletionRequest, context: GrpcContext
    ) -> AsyncGenerator[pb.ChatCompletionChunk, None]:
        """Streams the answer to a conversation."""
        messages = [ChatMessage(message.role, message.content) for message in request.messages]

        async def accept(x_request_id: str) -> Accepted:
            return await self._gateway.chat(request.model, messages, sampling_fields(request), x_request_id)

        def chunk(accepted: Accepted, event: GenerationEvent) -> pb.ChatCompletionChunk:
            return pb.ChatCompletionChunk(
                id=accepted.id,
                content=event.text,
                token_ids=event.token_ids,
                finish_reason=_finish_reason(event),
                usage=_usage(event.usage),
                model=self._gateway.model.name,
                created=accepted.created,
                logprobs=_logprobs(event),
                index=event.index,
            )

        async with aclosing(_stream(accept, chunk, pb.ChatCompletionChunk(), context)) as chunks:
            async for made in chunks:
                yield made

    async def completion(
        self, request: pb.CompletionRequest, context: GrpcContext
    ) -> AsyncGenerator[pb.CompletionChunk, None]:
        """Streams the continuation of a prompt."""

        async def accept(x_request_id: str) -> Accepted:
            kind = request.WhichOneof("prompt")
            if kind is None:
                raise InvalidRequestError("prompt must be text or token_ids, got neither")
            prompt = request.text if kind == "text" else list(request.token_ids.ids)
            return await self._gateway.complete(request.model, prompt, sampling_fields(request), x_request_id)

        def chunk(accepted: Accepted, event: GenerationEvent) -> pb.CompletionChunk:
            return pb.CompletionChunk(
                id=accepted.id,
                text=event.text,
                token_ids=event.token_ids,
                finish_reason=_finish_reason(event),
                usage=_usage(event.usage),
                model=self._gateway.model.name,
                created=accepted.created,
                logprobs=_logprobs(event),
                index=event.index,
            )

        async with aclosing(_stream(accept, chunk, pb.CompletionChunk(), context)) as chunks:
            async for made in chunks:
                yield made

    async def list_models(self, _: pb.ListModelsRequest, context: GrpcContext) -> pb.ListModelsResponse:
        """The served model."""
        model = self._gateway.model
        entry = pb.Model(id=model.name, max_model_len=model.max_model_len, vocab_size=model.vocab_size)
        return pb.ListModelsResponse(models=[entry])

    async def tokenize(self, request: pb.TokenizeRequest, context: GrpcContext) -> pb.TokenizeResponse:
        """Text to token ids."""
        ids = await _answer(lambda: self._gateway.tokenize(request.model, request.text), context)
        return pb.TokenizeResponse(token_ids=pb.TokenIds(ids=ids))

    async def detokenize(self, request: pb.DetokenizeRequest, context: GrpcContext) -> pb.DetokenizeResponse:
        """Token ids to text."""

        async def detokenize() -> str:
            return self._gateway.detokenize(request.model, request.token_ids.ids)

        text = await _answer(detokenize, context)
        return pb.DetokenizeResponse(text=text)

    async def check(
        self, request: health_pb2.HealthCheckRequest, context: GrpcContext
    ) -> health_pb2.HealthCheckResponse:
        """SERVING unless draining; a gateway that cannot be reached answers nothing at all."""
        if request.service not in _HEALTH_SERVICES:
            context.set_code(grpc.StatusCode.NOT_FOUND)
            context.set_details(f"service must be empty or {_HEALTH_SERVICES[1]}, got {request.service[:100]!r}")
            raise RpcError("unknown service")
        response = health_pb2.HealthCheckResponse
        return response(status=response.SERVING if self._gateway.serving else response.NOT_SERVING)

    async def watch(
        self, _: health_pb2.HealthCheckRequest, context: GrpcContext
    ) -> AsyncGenerator[health_pb2.HealthCheckResponse, None]:
        """Not offered; clients take UNIMPLEMENTED, and it alone, for healthy (grpc/doc/health-checking.md)."""
        context.set_code(grpc.StatusCode.UNIMPLEMENTED)
        context.set_details("Watch is not offered; ask Check again instead")
        raise RpcError("Watch is not offered")
        yield  # a generator, as Serve wants for a stream


Chunk = TypeVar("Chunk", pb.ChatCompletionChunk, pb.CompletionChunk)


async def _stream(
    accept: Callable[[str], Awaitable[Accepted]],
    chunk: Callable[[Accepted, GenerationEvent], Chunk],
    empty: Chunk,
    context: GrpcContext,
) -> AsyncGenerator[Chunk, None]:
    x_request_id = _x_request_id(context)
    log_id = x_request_id or uuid.uuid4().hex
    back: list[tuple[str, str]] = [(_X_REQUEST_ID, x_request_id)] if x_request_id else []
    # It leaves with the first chunk: Serve drops trailing metadata when a method raises.
    context.set_trailing_metadata(back)
    try:
        accepted = await accept(x_request_id)
        log_id = accepted.log_id
        async with aclosing(accepted):
            async for event in accepted:
                yield chunk(accepted, event)
        return
    except Exception as error:
        status = status_of(error, log_id)
    _set_status(status, context)
    if status.retry_after_s is None:
        raise RpcError(status.message)
    context.set_trailing_metadata([*back, ("retry-after-ms", str(round(status.retry_after_s * 1000)))])
    yield empty


async def _answer(call: Callable[[], Awaitable[Reply]], context: GrpcContext) -> Reply:
    try:
        return await call()
    except Exception as error:
        status = status_of(error, _x_request_id(context) or uuid.uuid4().hex)
    _set_status(status, context)
    raise RpcError(status.message)


def _x_request_id(context: GrpcContext) -> str:
    """The client's own name of its request; empty if it gave none."""
    return dict(context.invocation_metadata()).get(_X_REQUEST_ID, "")[:_MAX_ID]


def _set_status(status: Status, context: GrpcContext) -> None:
    context.set_code(status.code)
    context.set_details(status.message)


def sampling_fields(request: pb.CompletionRequest | pb.ChatCompletionRequest) -> SamplingFields:
    """The sampling part; fields that are absent stay None."""

    def integer(name: str) -> int | None:
        return int(getattr(request, name)) if request.HasField(name) else None

    def number(name: str) -> float | None:
        return float(getattr(request, name)) if request.HasField(name) else None

    return SamplingFields(
        max_tokens=integer("max_tokens"),
        temperature=number("temperature"),
        top_p=number("top_p"),
        top_k=integer("top_k"),
        seed=integer("seed"),
        stop=tuple(request.stop),
        ignore_eos=request.ignore_eos,
        presence_penalty=number("presence_penalty"),
        frequency_penalty=number("frequency_penalty"),
        repetition_penalty=number("repetition_penalty"),
        logprobs=integer("logprobs"),
        n=integer("n"),
    )


def _finish_reason(event: GenerationEvent) -> pb.FinishReason | None:
    return None if event.finish_reason is None else _FINISH_REASONS[event.finish_reason]


def _usage(usage: Usage | None) -> pb.Usage | None:
    if usage is None:
        return None
    return pb.Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        total_tokens=usage.total_tokens,
        cached_tokens=usage.cached_tokens,
    )


def _logprobs(event: GenerationEvent) -> list[pb.PositionLogprobs]:
    return [_position(token, logprob) for token, logprob in zip(event.token_ids, event.logprobs, strict=False)]


def _position(token: int, logprob: TokenLogprob) -> pb.PositionLogprobs:
    top = [pb.TokenLogprob(token_id=other, logprob=value) for other, value in logprob.top]
    return pb.PositionLogprobs(chosen=pb.TokenLogprob(token_id=token, logprob=logprob.logprob), top=top)
