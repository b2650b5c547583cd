"""What every rank of a cell is told at its start. No torch: the coordinator and the gateway read it too."""

from dataclasses import dataclass

from cluster.limits import EngineLimits
from cluster.topology import Topology
from model_shards.config import ModelConfig
from model_shards.errors import ConfigError
from model_shards.placement import ExpertPlacement, contiguous_placement


@dataclass(frozen=True)
class CellSpec:
    """One cell: the checkpoint, its cut, and the bounds of its engines."""

    model_directory: str
    topology: Topology
    device: str  # "cpu" | "cuda"
    dtype: str  # "float32" | "bfloat16"
    limits: EngineLimits
    host: str = "127.0.0.1"  # the interface that ranks of this host meet on
    load_timeout_s: float = 1800.0  # from a rank's start until its weights are in memory
    join_timeout_s: float = 60.0  # all ranks must have joined an epoch by then
    exchange_timeout_s: float = 60.0
    log_level: str = "INFO"
    expert_resource: str | None = None  # a custom Ray resource that expert actors ask 1 of
    kv_cache_dtype: str = "auto"  # "auto": the model's dtype | "int8" | "fp8"
    attention_weights: str = "auto"  # "auto": the model's dtype | "int8": see AttentionModel.lay_out
    trace_directory: str | None = None  # where each rank writes when it waited, at the end of an epoch
    data_backend: str | None = None  # one of process_group.BACKENDS; None: what the device is made for

    @property
    def backend(self) -> str:
        """What carries the data: one of process_group.BACKENDS. gloo carries CUDA tensors too, of ranks of one GPU."""
        return self.data_backend or ("nccl" if self.device == "cuda" else "auto")

    def placement(self, config: ModelConfig) -> ExpertPlacement:
        """Which shard holds which expert; the same on every rank."""
        if config.n_routed_experts is None:
            raise ConfigError(
                f"{self.model_directory} has no routed experts (n_routed_experts is not set): nothing to shard"
            )
        return contiguous_placement(config.n_routed_experts, self.topology.num_expert)
