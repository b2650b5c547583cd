"""The Ray Serve shell of the gateway: one class behind the gRPC proxy and the HTTP proxy; it only forwards."""

import asyncio
import uuid
from collections.abc import AsyncGenerator, Awaitable
from contextlib import aclosing
from pathlib import Path

import grpc
import ray
from fastapi import FastAPI
from grpc_health.v1 import health_pb2
from ray import serve
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.grpc_util import RayServegRPCContext
from ray.serve.handle import DeploymentHandle

from cluster.link.receiver import OutputLink
from cluster.logs import configure_logging
from cluster.request import GenerationRequest, StepOutput
from deploy.config import ShoalSettings
from deploy.gateway import inference_pb2 as pb
from deploy.gateway.grpc_methods import InferenceServicer
from deploy.gateway.http import create_http_app
from deploy.gateway.service import RETRY_AFTER_S, Gateway, GatewayLimits
from deploy.gateway.validation import ModelLimits
from deploy.text import ChatTokenizer
from model_shards.config import load_model_config
from model_shards.errors import OverloadedError, UnavailableError

# Beside the bounds of loading and joining: an attention replica's process.
_SERVE_START_S = 60.0


class ServeEngineClient:
    """EngineClient over a Serve deployment handle: Serve picks the replica and watches it, outputs come over the link.

    The call to the replica is open as long as the request runs; cancelling it cancels the request.
    """

    def __init__(self, attention: DeploymentHandle, link: OutputLink) -> None:
        # Over gRPC: a millisecond less than an actor call. A handle calls as the process that bound the application had
        # it when Serve was imported there, and `shoal serve` sets SERVE_ENVIRONMENT later.
        self._run = attention.options(_by_reference=False).run
        self._link = link
        self._calls: set[asyncio.Future[None]] = set()  # the event loop alone would not keep them

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[StepOutput, None]:
        """Streams from one attention replica; leaving early cancels the request there.

        Raises UnavailableError when the replica or the link to it was lost or Serve has none, OverloadedError when
        Serve queues no more; what the replica itself raised comes through as its class.
        """
        with self._link.open_stream(request.request_id) as stream:
            response = self._run.remote(request, stream.address)
            call = self._watch(response)
            ended = False
            try:
                async with aclosing(stream.outputs(call)) as outputs:
                    async for output in outputs:
                        ended = output.finish_reason is not None
                        yield output
            except (ray.exceptions.RayActorError, grpc.aio.AioRpcError) as error:
                # Serve calls the replica over gRPC, and makes its own error of UNAVAILABLE alone.
                raise UnavailableError("the attention replica of this request was lost; send it again") from error
            except (DeploymentUnavailableError, ReplicaUnavailableError) as error:
                raise UnavailableError("no attention replica is available; send the request again") from error
            except BackPressureError as error:
                delay_s = RETRY_AFTER_S if error.retry_after_s is None else error.retry_after_s
                raise OverloadedError("the attention replicas have all the requests they take", delay_s) from error
            finally:
                if not ended:
                    response.cancel()
                    call.cancel()

    def _watch(self, response: Awaitable[None]) -> "asyncio.Future[None]":
        async def wait() -> None:
            await response

        def done(call: "asyncio.Future[None]") -> None:
            self._calls.discard(call)
            if not call.cancelled():
                call.exception()  # whoever reads the stream was told; here nobody is left to raise it to

        call = asyncio.ensure_future(wait())
        self._calls.add(call)
        call.add_done_callback(done)
        return call


def _http_app() -> FastAPI:
    def gateway() -> Gateway:
        deployment = serve.get_replica_context().servable_object
        assert isinstance(deployment.gateway, Gateway)
        return deployment.gateway

    return create_http_app(gateway)


class GatewayIngress:
    """gRPC methods carry the names of the protobuf services; Serve routes by them."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, settings: ShoalSettings, max_model_len: int, attention: DeploymentHandle
    ) -> None:
        configure_logging("gateway", uuid.uuid4().hex[:8], settings.log.level)
        directory = Path(settings.model.path)
        config = load_model_config(directory)
        # Where this node's other processes and the other nodes reach it; on one machine Ray itself stays on loopback.
        link = await OutputLink.open(ray.util.get_node_ip_address())
        self.gateway = Gateway(
            tokenizer=ChatTokenizer.load(directory),
            model=ModelLimits(settings.model.name, config.vocab_size, max_model_len),
            limits=GatewayLimits(settings.server.max_concurrent_requests, settings.server.request_timeout_s),
            engine=ServeEngineClient(attention, link),
        )
        self._servicer = InferenceServicer(self.gateway)
        # Constructed means healthy to Serve, and SERVING to clients: not before an attention replica can answer.
        timeout_s = settings.cell.load_timeout_s + settings.cell.join_timeout_s + _SERVE_START_S
        await asyncio.wait_for(attention.load.remote(), timeout_s)

    async def ChatCompletion(
        self, request: pb.ChatCompletionRequest, grpc_context: RayServegRPCContext
    ) -> AsyncGenerator[pb.ChatCompletionChunk, None]:
        async with aclosing(self._servicer.chat_completion(request, grpc_context)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def Completion(
        self, request: pb.CompletionRequest, grpc_context: RayServegRPCContext
    ) -> AsyncGenerator[pb.CompletionChunk, None]:
        async with aclosing(self._servicer.completion(request, grpc_context)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def ListModels(
        self, request: pb.ListModelsRequest, grpc_context: RayServegRPCContext
    ) -> pb.ListModelsResponse:
        return await self._servicer.list_models(request, grpc_context)

    async def Tokenize(self, request: pb.TokenizeRequest, grpc_context: RayServegRPCContext) -> pb.TokenizeResponse:
        return await self._servicer.tokenize(request, grpc_context)

    async def Detokenize(
        self, request: pb.DetokenizeRequest, grpc_context: RayServegRPCContext
    ) -> pb.DetokenizeResponse:
        return await self._servicer.detokenize(request, grpc_context)

    async def Check(
        self, request: health_pb2.HealthCheckRequest, grpc_context: RayServegRPCContext
    ) -> health_pb2.HealthCheckResponse:
        return await self._servicer.check(request, grpc_context)

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, grpc_context: RayServegRPCContext
    ) -> AsyncGenerator[health_pb2.HealthCheckResponse, None]:
        async with aclosing(self._servicer.watch(request, grpc_context)) as responses:
            async for response in responses:
                yield response

    async def drain(self) -> None:
        """From now on new requests are refused with UNAVAILABLE; returns when the running ones ended."""
        await self.gateway.drain()


GatewayDeployment = serve.deployment(name="gateway")(serve.ingress(_http_app)(GatewayIngress))
