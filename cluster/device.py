"""Which device and element type a rank computes with."""

import os
from pathlib import Path

import torch

from cluster.spec import CellSpec
from cluster.topology import Role, Topology
from model_shards.errors import ConfigError
from model_shards.quantization import Quantization

# What a rank's process needs in its environment before it loads torch. An OpenMP thread that has nothing to do spins
# for as long as the step's next product is usually in coming, and then sleeps: a rank of the other role needs its core.
RANK_ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "10000",
    # Weights in pages of 2 MiB where glibc and the kernel know how: reading them takes a tenth less time.
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}

_CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def torch_dtype(spec: CellSpec) -> torch.dtype:
    """The element type of weights, activations and cache. Raises ConfigError for one that is not served."""
    if spec.dtype not in _DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(_DTYPES)}, got {spec.dtype!r}")
    return _DTYPES[spec.dtype]


def kv_quantization(spec: CellSpec) -> Quantization | None:
    """How the latent cache is stored; None for the model's own dtype. Raises ConfigError for an unknown way."""
    if spec.kv_cache_dtype == "auto":
        return None
    known = tuple(kind.value for kind in Quantization)
    if spec.kv_cache_dtype not in known:
        raise ConfigError(f"kv_cache_dtype must be one of auto, {', '.join(known)}, got {spec.kv_cache_dtype!r}")
    return Quantization(spec.kv_cache_dtype)


def local_device(spec: CellSpec, index: int) -> torch.device:
    """The device of the `index`-th rank of this host. NCCL wants a GPU per rank; over gloo ranks may share one.

    Raises ConfigError when there is none.
    """
    if spec.device == "cpu":
        # Until `use_threads`. A second thread that OpenMP holds would for good count against those of the step.
        torch.set_num_threads(1)
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if count == 0 or (spec.backend == "nccl" and index >= count):
        raise ConfigError(f"rank {index} of this host needs its own GPU, {count} are visible")
    return torch.device("cuda", index % count)


def use_threads(spec: CellSpec, role: Role) -> None:
    """Gives the calling thread, the one that computes the steps, its share of this host's cores."""
    if spec.device == "cpu":
        torch.set_num_threads(num_threads(spec.topology, role, available_cores()))


def num_threads(topology: Topology, role: Role, num_cores: int) -> int:
    """Threads of a CPU rank on a host that has all ranks; with ranks on several hosts some cores stay idle.

    Ranks of one role compute at the same time and share the cores; those of the other role wait meanwhile. With
    several micro-batches they do not, and all contend: then what overlaps is measured with that in it.
    """
    ranks = topology.num_attention if role is Role.ATTENTION else topology.num_expert
    return max(1, num_cores // ranks)


def meanwhile_threads(topology: Topology, num_cores: int) -> int:
    """Threads of an attention rank for what it computes while the expert ranks do, on a host that has them all; with
    ranks on several hosts some cores stay idle.

    A thread that the others keep from its core holds up the rest of its team (measured in benchmarks/NOTES.md).
    """
    return max(1, num_cores // (topology.num_attention + topology.num_expert))


def available_cores() -> int:
    """Cores that this process may use: of its affinity mask, and of the container's CPU limit (cgroup v2)."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = _CPU_LIMIT.read_text(encoding="ascii").split()
    except (FileNotFoundError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))
