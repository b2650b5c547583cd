"""A gRPC service on a free loopback port that answers from a script: what the command line is tested against."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from deploy.gateway import inference_pb2 as pb
from deploy.gateway.inference_pb2_grpc import InferenceServicer, add_InferenceServicer_to_server


@dataclass(frozen=True)
class Refusal:
    """Ends a call with this status."""

    code: grpc.StatusCode
    detail: str


@dataclass
class Script(InferenceServicer, health_pb2_grpc.HealthServicer):
    """Answers each chat with `pieces`, each completion with as many tokens as it asks for."""

    pieces: Sequence[str] = ("Whales ", "are ", "large.")
    delay_s: float = 0.0  # before each chunk
    refuse: Callable[[int], Refusal | None] = lambda _: None  # by the number of the request, from 0
    short_by: int = 0  # tokens that a completion leaves out
    max_model_len: int = 256
    serving: bool = True
    model_ids: Sequence[str] = ("tiny",)
    requests: list[pb.ChatCompletionRequest | pb.CompletionRequest] = field(default_factory=list)
    cancelled: threading.Event = field(default_factory=threading.Event)
    most_at_once: int = 0
    _at_once: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def Check(self, request, context):
        status = health_pb2.HealthCheckResponse
        return status(status=status.SERVING if self.serving else status.NOT_SERVING)

    def ListModels(self, request, context):
        made = [pb.Model(id=name, max_model_len=self.max_model_len, vocab_size=100) for name in self.model_ids]
        return pb.ListModelsResponse(models=made)

    def ChatCompletion(self, request, context):
        with self._counted(request, context):
            for index, text in enumerate(self.pieces):
                self._pause(context)
                yield pb.ChatCompletionChunk(content=text, token_ids=[index])
            yield pb.ChatCompletionChunk(finish_reason=pb.FINISH_REASON_STOP, usage=pb.Usage(completion_tokens=3))

    def Completion(self, request, context):
        with self._counted(request, context):
            count = request.max_tokens - self.short_by
            for index in range(count):
                self._pause(context)
                last = {"finish_reason": pb.FINISH_REASON_LENGTH, "usage": pb.Usage(completion_tokens=count)}
                yield pb.CompletionChunk(text="x", token_ids=[index], **(last if index == count - 1 else {}))

    def _pause(self, context):
        deadline = time.monotonic() + self.delay_s
        while context.is_active() and time.monotonic() < deadline:
            time.sleep(0.002)

    @contextlib.contextmanager
    def _counted(self, request, context):
        with self._lock:
            number = len(self.requests)
            self.requests.append(request)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        context.add_callback(self._ended)
        try:
            refusal = self.refuse(number)
            if refusal is not None:
                context.abort(refusal.code, refusal.detail)
            yield
        finally:
            if not context.is_active():
                self.cancelled.set()

    def _ended(self):
        with self._lock:
            self._at_once -= 1


@contextlib.contextmanager
def scripted_service(script: Script) -> Iterator[str]:
    """The address at which `script` answers inside the block."""
    with ThreadPoolExecutor(16) as pool:
        server = grpc.server(pool)
        add_InferenceServicer_to_server(script, server)
        health_pb2_grpc.add_HealthServicer_to_server(script, server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            server.stop(0).wait(5.0)
