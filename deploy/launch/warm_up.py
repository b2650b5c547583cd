"""The proof that a service is ready: a real token through every expert shard, over gRPC."""

from pathlib import Path

import grpc
import ray

from cluster.actors.client import NAMESPACE
from cluster.actors.coordinator import expert_actor_name
from cluster.spec import CellSpec
from deploy.gateway import inference_pb2 as pb
from deploy.gateway.inference_pb2_grpc import InferenceStub
from model_shards.config import load_model_config
from model_shards.errors import UnavailableError

_TOKENS = 64
_TRIES = 8
_CALL_S = 60.0


def warm_up(address: str, spec: CellSpec) -> None:
    """Sends real requests to the gateway at `address` until every expert shard has computed a row.

    Raises UnavailableError naming the shards that saw none, or the status that a request ended with.
    """
    shards = [ray.get_actor(expert_actor_name(i), namespace=NAMESPACE) for i in range(spec.topology.num_expert)]
    vocab_size = load_model_config(Path(spec.model_directory)).vocab_size
    length = min(_TOKENS, max(1, spec.limits.max_model_len - 1))
    rows: list[int] = []
    # A proxy for the outside world must not come between two processes of one service.
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        stub = InferenceStub(channel)  # type: ignore[no-untyped-call]  # generated code
        for attempt in range(_TRIES):
            # Other tokens each time: a shard whose experts no token chose yet gets another chance.
            ids = [(attempt * length + index) % vocab_size for index in range(length)]
            _complete(stub, ids)
            rows = ray.get([shard.rows_received.remote() for shard in shards], timeout=_CALL_S)
            if all(rows):
                return
    idle = ", ".join(f"E{index}" for index, count in enumerate(rows) if count == 0)
    raise UnavailableError(f"no token reached expert shards {idle} in {_TRIES} warm-up requests")


def _complete(stub: InferenceStub, ids: list[int]) -> None:
    request = pb.CompletionRequest(token_ids=pb.TokenIds(ids=ids), max_tokens=1, temperature=0.0)
    try:
        for _ in stub.Completion(request, timeout=_CALL_S, wait_for_ready=True):
            continue
    except grpc.RpcError as error:
        raise UnavailableError(f"the first request failed: {error.code().name}: {error.details()}") from error
