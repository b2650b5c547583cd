"""Fills a rank's model from the checkpoint: tensors in file order, each through one reused buffer.

Files are read, not mapped: pages of a mapping count as the process's memory for as long as a tensor looks at them, and
a rank would seem to hold every file it touched. So the peak is the slice plus the largest tensor, as stored.
"""

from collections.abc import Callable, Iterable
from io import BufferedReader
from itertools import groupby
from pathlib import Path

import torch

from model_shards.config import ModelConfig
from model_shards.errors import CheckpointError
from model_shards.experts import ExpertShardModel
from model_shards.model import AttentionModel
from model_shards.weights.check import checked_tensors
from model_shards.weights.header import StoredTensor
from model_shards.weights.memory import attention_slice_bytes, available_bytes, check_memory, expert_slice_bytes

# Called with (bytes read, bytes to read): once before the first tensor and once after each.
Progress = Callable[[int, int], None]


def load_attention_model(
    directory: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress | None = None,
    reserved_bytes: int = 0,
) -> AttentionModel:
    """The attention rank's slice; no routed expert is read.

    `reserved_bytes` is what the caller will allocate beside it, the KV cache: both must fit, or nothing is loaded.

    Raises CheckpointError when the checkpoint does not fit `config` (before anything is allocated) or changes while it
    is read, CapacityError when `device` has less free memory than that takes.
    """
    tensors = checked_tensors(directory, config)
    what = "the attention slice" + (" with its KV cache" if reserved_bytes else "")
    _check_room(attention_slice_bytes(config, dtype) + reserved_bytes, device, what)
    model = AttentionModel(config, dtype, device)
    _fill(model.hf_slices(), tensors, progress)
    return model


def load_expert_shard(
    directory: Path,
    config: ModelConfig,
    experts: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress | None = None,
) -> ExpertShardModel:
    """The slice of an expert rank: `experts` of every MoE layer and nothing else. Raises as `load_attention_model`."""
    tensors = checked_tensors(directory, config)
    what = f"a slice of {len(experts)} of {config.n_routed_experts} experts"
    _check_room(expert_slice_bytes(config, len(experts), dtype), device, what)
    shard = ExpertShardModel(config, experts, dtype, device)
    _fill(shard.hf_slices(), tensors, progress)
    return shard


def _check_room(needed: int, device: torch.device, what: str) -> None:
    available = available_bytes(device)
    if available is not None:
        check_memory(needed, available, f"{what} on {device}")


def _fill(
    slices: Iterable[tuple[str, torch.Tensor]], tensors: dict[str, StoredTensor], progress: Progress | None
) -> None:
    """Copies each named tensor into its view, converting the dtype."""
    jobs = [(tensors[name], view) for name, view in slices]
    jobs.sort(key=lambda job: (job[0].file, job[0].start))
    total = sum(tensor.num_bytes for tensor, _ in jobs)
    buffer = bytearray(max((tensor.num_bytes for tensor, _ in jobs), default=0))
    done = 0
    if progress is not None:
        progress(done, total)
    for file, jobs_of_file in groupby(jobs, key=lambda job: job[0].file):
        with _open(file) as stream:
            for tensor, view in jobs_of_file:
                _read_into(stream, tensor, memoryview(buffer)[: tensor.num_bytes])
                stored = torch.frombuffer(buffer, dtype=tensor.dtype, count=tensor.num_bytes // tensor.dtype.itemsize)
                view.copy_(stored.view(tensor.shape))
                done += tensor.num_bytes
                if progress is not None:
                    progress(done, total)


def _open(file: Path) -> BufferedReader:
    try:
        return file.open("rb")
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error


def _read_into(stream: BufferedReader, tensor: StoredTensor, target: memoryview) -> None:
    """Fills `target`; the system may give less than was asked in one read."""
    try:
        stream.seek(tensor.start)
        while target:
            count = stream.readinto(target)
            if not count:
                raise CheckpointError(f"{tensor.file} became shorter while tensor {tensor.name} was read from it")
            target = target[count:]
    except OSError as error:
        raise CheckpointError(f"{tensor.file} cannot be read at tensor {tensor.name}: {error.strerror}") from error
