"""Which device and element type a rank computes with."""

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch

from cluster.spec import CellSpec
from cluster.topology import Role, Topology
from model_shards.errors import ConfigError
from model_shards.kernels.machine_code import find_openmp, on_each_thread
from model_shards.quantization import Quantization

# What a rank's process needs in its environment before it loads torch. An OpenMP thread that has nothing to do spins
# for as long as the step's next product is usually in coming, and then sleeps: a rank of the other role needs its core.
RANK_ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "10000",
    # Weights in pages of 2 MiB where glibc and the kernel know how: reading them takes a tenth less time.
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}

# With one of these the operator says where threads go.
_PLACES = ("GOMP_CPU_AFFINITY", "OMP_PLACES", "OMP_PROC_BIND")
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


def attention_in_int8(spec: CellSpec) -> bool:
    """Whether an attention rank holds its matrices in 8 bits. Raises ConfigError for an unknown way."""
    if spec.attention_weights not in ("auto", "int8"):
        raise ConfigError(f"attention_weights must be one of auto, int8, got {spec.attention_weights!r}")
    return spec.attention_weights == "int8"


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
    """Gives the calling thread, the one that computes the steps, its share of this host's cores, and leaves it and its
    team free to go to any: threads that it makes now, as those of a transport, go where they like."""
    if spec.device == "cpu":
        count = num_threads(spec.topology, role, available_cores())
        torch.set_num_threads(count)
        _keep_team([os.sched_getaffinity(os.getpid())] * count)


def pin_threads(spec: CellSpec, role: Role, index: int, team_shrinks: bool = False) -> None:
    """Keeps it and its team on cores of their own, where that is known to do no harm. For a rank of a cell that is all
    on this host; `index` counts the role's ranks.

    Woken together, two threads of a team may be put on one core while the next one is idle, for as long as it takes the
    kernel to notice: some milliseconds, a layer's whole time (measured in benchmarks/NOTES.md).
    """
    if spec.device != "cpu":
        return
    cores = available_cores()
    if may_pin(spec.topology, role, cores, team_shrinks):
        own = own_cores(sorted(os.sched_getaffinity(os.getpid())), index, num_threads(spec.topology, role, cores))
        _keep_team([{core} for core in own])


def may_pin(topology: Topology, role: Role, cores: int, team_shrinks: bool = False) -> bool:
    """Whether threads may stay on cores of their own.

    Not where the operator says where OpenMP's threads go. Not under a CPU limit, as `available_cores` knows it: which
    of the host's cores are idle is not known then. Only when the ranks of the role take all cores, each the same
    number: else some would share a core while another is idle. And not with a team that shrinks and grows in every
    layer: a thread that is made anew stays where its maker is.
    """
    if any(name in os.environ for name in _PLACES) or cores != len(os.sched_getaffinity(os.getpid())):
        return False
    ranks = topology.num_attention if role is Role.ATTENTION else topology.num_expert
    count = num_threads(topology, role, cores)
    if count > 1 and find_openmp() is None:
        return False  # the threads of another library would all stay where the calling one is
    return ranks * count == cores and not (team_shrinks and meanwhile_threads(topology, cores) not in (1, count))


def own_cores(cores: Sequence[int], index: int, count: int) -> list[int]:
    """The cores of the `index`-th rank of a role whose ranks have `count` threads each."""
    return [cores[(index * count + thread) % len(cores)] for thread in range(count)]


def _keep_team(places: Sequence[set[int]]) -> None:
    def keep(thread: int) -> None:
        # A core that was taken away meanwhile: the thread goes where the kernel puts it.
        with suppress(OSError):
            os.sched_setaffinity(0, places[thread])

    on_each_thread(keep, len(places))


def num_threads(topology: Topology, role: Role, num_cores: int) -> int:
    """Threads of a CPU rank on a host that has all ranks; with ranks on several hosts some cores stay idle.

    Ranks of one role compute at the same time and share the cores; those of the other role wait meanwhile. With
    several micro-batches they do not, and all contend: then what overlaps is measured with that in it.
    """
    ranks = topology.num_attention if role is Role.ATTENTION else topology.num_expert
    return max(1, num_cores // ranks)


def meanwhile_threads(topology: Topology, num_cores: int) -> int:
    """Threads of an attention rank for what modules compute while the expert ranks do, on a host that has them all;
    with ranks on several hosts some cores stay idle. Programs compute it before, with all threads.

    A thread that the others keep from its core holds up the rest of its team (measured in benchmarks/NOTES.md).
    """
    return max(1, num_cores // (topology.num_attention + topology.num_expert))


def available_cores() -> int:
    """Cores that this process may use: its main thread's affinity, and the container's CPU limit (cgroup v2)."""
    cores = len(os.sched_getaffinity(os.getpid()))
    try:
        quota, period = _CPU_LIMIT.read_text(encoding="ascii").split()
    except (FileNotFoundError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))
