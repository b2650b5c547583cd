"""How much memory a slice takes, and whether there is as much."""

from pathlib import Path

import torch
from torch import nn

from model_shards.config import ModelConfig
from model_shards.errors import CapacityError
from model_shards.experts import ExpertShardModel
from model_shards.model import AttentionModel
from model_shards.quantization import Quantization
from model_shards.up_projection import laid_out_bytes

_GIB = 2**30
_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def attention_slice_bytes(config: ModelConfig, dtype: torch.dtype, device_type: str) -> int:
    """Bytes of the weights of one attention rank as they are laid out on a "cpu" or "cuda"; allocates nothing."""
    model = AttentionModel(config, dtype, torch.device("meta"))
    if device_type != "cpu":
        return _parameter_bytes(model)
    # A CPU holds W_UK and W_UV in a layout of their own in place of kv_b_proj.
    replaced = [weight for name, weight in model.hf_slices() if name.endswith("kv_b_proj.weight")]
    laid_out = sum(
        laid_out_bytes(config.qk_nope_head_dim, config.v_head_dim, weight.numel(), dtype) for weight in replaced
    )
    return _parameter_bytes(model) + laid_out - sum(weight.nbytes for weight in replaced)


def expert_slice_bytes(
    config: ModelConfig, num_experts: int, dtype: torch.dtype, quantization: Quantization | None = None
) -> int:
    """Bytes of the weights of an expert rank with `num_experts` experts in every MoE layer; allocates nothing."""
    experts = tuple(range(num_experts))
    return _parameter_bytes(ExpertShardModel(config, experts, dtype, torch.device("meta"), quantization))


def available_bytes(device: torch.device) -> int | None:
    """Memory that an allocation on `device` may take now; None where the system does not tell (a CPU outside Linux).

    On CPU within the container's limit, past which a process is killed and not refused.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    known = [free for free in (_system_memory(), container_memory()) if free is not None]
    return min(known, default=None)


def container_memory() -> int | None:
    """Bytes left under the memory limit of cgroup v2; None without one.

    Pages of files count as used there, those of a checkpoint that was read as well; the kernel takes them back first.
    """
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
        statistics = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
    except FileNotFoundError:
        # The root group has no limit, and cgroup v1 no such file.
        return None
    if limit == "max":
        return None
    of_files = sum(int(statistics.get(name, 0)) for name in ("inactive_file", "active_file"))
    return min(int(limit), max(0, int(limit) - used + of_files))


def _system_memory() -> int | None:
    if not _MEMINFO.exists():
        return None
    for line in _MEMINFO.read_text().splitlines():
        key, _, value = line.partition(":")
        if key == "MemAvailable":
            return int(value.removesuffix("kB")) * 1024
    return None


def check_memory(needed_bytes: int, available_bytes: int, what: str) -> None:
    """Raises CapacityError with both numbers when `what` needs more than there is."""
    if needed_bytes > available_bytes:
        raise CapacityError(
            f"{what} needs {size_text(needed_bytes)} of memory and {size_text(available_bytes)} is available"
        )


def size_text(count: int) -> str:
    """Bytes for people."""
    return f"{count / _GIB:.2f} GiB" if count >= _GIB else f"{count / 2**20:.1f} MiB"


def _parameter_bytes(model: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())
