"""A small typed client of the gRPC service, for the command line.

with ShoalClient("127.0.0.1:9000") as client:
    for piece in client.chat([Message("user", "What is a whale?")], Sampling(max_tokens=64)):
        ...

Every call has a deadline; every failure is a CallError that carries the status by name.
"""

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from deploy.gateway import inference_pb2 as pb
from deploy.gateway.inference_pb2_grpc import InferenceStub
from model_shards.errors import ConfigError, ShoalError

CALL_TIMEOUT_S = 10.0
STREAM_TIMEOUT_S = 3600.0
# A proxy named by the environment must not stand between a client and its own machine.
_CHANNEL_OPTIONS = (("grpc.enable_http_proxy", 0), ("grpc.max_receive_message_length", 64 << 20))
_UNREACHABLE = ("failed to connect to all addresses", "DNS resolution failed", "Connection refused")


class CallError(ShoalError):
    """A call ended with a gRPC status other than OK; `code` is its name and says who should act."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(code, detail)
        self.code = code
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.code}: {self.detail}"


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; `role` is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True)
class Sampling:
    """How to generate; None leaves the choice to the server."""

    max_tokens: int | None = None
    temperature: float | None = None
    seed: int | None = None
    ignore_eos: bool = False


@dataclass(frozen=True)
class Usage:
    """Tokens of one finished request."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Piece:
    """One chunk of an answer; the last one has `finish_reason` ("stop", "length") and `usage`."""

    text: str
    num_tokens: int
    finish_reason: str | None = None
    usage: Usage | None = None


@dataclass(frozen=True)
class ServedModel:
    """What `ListModels` tells of a model."""

    id: str
    max_model_len: int  # tokens
    vocab_size: int


class ShoalClient:
    """One channel to one service; close it, or use it as a context manager. Threads may share it.

    Raises ConfigError for an address that is not HOST:PORT, and CallError from every call.
    """

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 65536:
            raise ConfigError(f"an address must be HOST:PORT with a port of 1 to 65535, got {address!r}")
        self.address = address
        self._channel = grpc.insecure_channel(address, options=_CHANNEL_OPTIONS)
        self._stub = InferenceStub(self._channel)  # type: ignore[no-untyped-call]  # generated code
        self._health = health_pb2_grpc.HealthStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Closes the channel; calls that run on it end with CANCELLED."""
        self._channel.close()

    def health(self) -> str:
        """The service's own word: SERVING, NOT_SERVING (draining) or UNKNOWN."""
        with self._errors():
            answer = self._health.Check(health_pb2.HealthCheckRequest(), timeout=CALL_TIMEOUT_S)
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))

    def models(self) -> tuple[ServedModel, ...]:
        """The served models."""
        with self._errors():
            answer = self._stub.ListModels(pb.ListModelsRequest(), timeout=CALL_TIMEOUT_S)
        return tuple(ServedModel(model.id, model.max_model_len, model.vocab_size) for model in answer.models)

    def chat(self, messages: Sequence[Message], sampling: Sampling, model: str = "") -> Generator[Piece, None, None]:
        """Streams the answer to a conversation; closing the iterator cancels the request."""
        request = pb.ChatCompletionRequest(
            model=model,
            messages=[pb.ChatMessage(role=message.role, content=message.content) for message in messages],
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            seed=sampling.seed,
            ignore_eos=sampling.ignore_eos,
        )
        chunks = self._stub.ChatCompletion(request, timeout=STREAM_TIMEOUT_S)
        with self._errors(), _cancelled_at_the_end(chunks):
            for chunk in chunks:
                yield _piece(chunk, chunk.content)

    def complete(self, token_ids: Sequence[int], sampling: Sampling, model: str = "") -> Generator[Piece, None, None]:
        """Streams the continuation of a prompt; closing the iterator cancels the request."""
        request = pb.CompletionRequest(
            model=model,
            token_ids=pb.TokenIds(ids=token_ids),
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            seed=sampling.seed,
            ignore_eos=sampling.ignore_eos,
        )
        chunks = self._stub.Completion(request, timeout=STREAM_TIMEOUT_S)
        with self._errors(), _cancelled_at_the_end(chunks):
            for chunk in chunks:
                yield _piece(chunk, chunk.text)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except grpc.RpcError as error:
            # What a call raises is the call itself, and has a status.
            if not isinstance(error, grpc.Call):
                raise
            detail = error.details() or "the server gave no details"
            if error.code() is grpc.StatusCode.UNAVAILABLE and any(text in detail for text in _UNREACHABLE):
                detail = f"nothing answers at {self.address}"
            raise CallError(error.code().name, detail) from error


class _Cancellable(Protocol):
    def cancel(self) -> bool: ...


@contextmanager
def _cancelled_at_the_end(call: _Cancellable) -> Iterator[None]:
    """Cancels a call that is left before its end; does nothing to one that has ended."""
    try:
        yield
    finally:
        call.cancel()


def _piece(chunk: pb.ChatCompletionChunk | pb.CompletionChunk, text: str) -> Piece:
    reason = None
    if chunk.HasField("finish_reason"):
        reason = pb.FinishReason.Name(chunk.finish_reason).removeprefix("FINISH_REASON_").lower()
    usage = None
    if chunk.HasField("usage"):
        usage = Usage(chunk.usage.prompt_tokens, chunk.usage.completion_tokens)
    return Piece(text, len(chunk.token_ids), reason, usage)
