"""Fills a rank's model from the checkpoint: tensors in file order, each straight into its place where it lies there as
it is stored, through one reused buffer where its dtype or device is another.

Of a cut checkpoint (`shoal shard`) every tensor is checked against its sum; nobody gets a model with one that failed.

Files are read, not mapped: pages of a mapping count as the process's memory for as long as a tensor looks at them, and
a rank would seem to hold every file it touched. So the peak is the slice plus the largest tensor that is converted, as
stored. Whoever loads calls `lay_out` next: its peak is the slice as laid out, one matrix of all experts of a layer, and
the largest matrix in float32.
"""

from collections.abc import Callable, Iterable
from io import FileIO
from pathlib import Path

import torch

from model_shards.config import ModelConfig
from model_shards.experts import ExpertShardModel
from model_shards.model import AttentionModel
from model_shards.weights.background import BackgroundReads
from model_shards.weights.check import Checkpoint
from model_shards.weights.header import StoredTensor
from model_shards.weights.memory import attention_slice_bytes, available_bytes, check_memory, expert_slice_bytes
from model_shards.weights.reading import ReadAhead, check_tensor, read_unchecked

# Called with (bytes read, bytes to read): once before the first tensor and once after each.
Progress = Callable[[int, int], None]
_META = torch.device("meta")


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

    Raises CheckpointError when the checkpoint does not fit `config` (before anything is allocated), changes while it
    is read or, cut by `shoal shard`, is not what was written then; CapacityError when `device` has less free memory
    than that takes.
    """
    names = {name for name, _ in AttentionModel(config, dtype, _META).hf_slices()}
    tensors = Checkpoint.open(directory).tensors(config, names)
    what = "the attention slice" + (" with its KV cache" if reserved_bytes else "")
    _check_room(attention_slice_bytes(config, dtype, device.type) + reserved_bytes, device, what)
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
    """The slice of an expert rank: `experts` of every MoE layer and nothing else, quantized when the checkpoint is.

    Raises as `load_attention_model`.
    """
    checkpoint = Checkpoint.open(directory)
    quantization = checkpoint.quantization
    names = {name for name, _ in ExpertShardModel(config, experts, dtype, _META, quantization).hf_slices()}
    tensors = checkpoint.tensors(config, names)
    what = f"a slice of {len(experts)} of {config.n_routed_experts} experts"
    _check_room(expert_slice_bytes(config, len(experts), dtype, quantization), device, what)
    shard = ExpertShardModel(config, experts, dtype, device, quantization)
    _fill(shard.hf_slices(), tensors, progress)
    return shard


def _check_room(needed: int, device: torch.device, what: str) -> None:
    available = available_bytes(device)
    if available is not None:
        check_memory(needed, available, f"{what} on {device}")


def _fill(
    slices: Iterable[tuple[str, torch.Tensor]], tensors: dict[str, StoredTensor], progress: Progress | None
) -> None:
    """Fills each view with the tensor of its name, converting the dtype."""
    jobs = [(tensors[name], view) for name, view in slices]
    jobs.sort(key=lambda job: (job[0].file, job[0].start))
    total = sum(tensor.num_bytes for tensor, _ in jobs)
    buffer = bytearray(max((tensor.num_bytes for tensor, view in jobs if not _as_stored(tensor, view)), default=0))
    done = 0
    if progress is not None:
        progress(done, total)
    with ReadAhead([tensor for tensor, _ in jobs]) as ahead:

        def on_read(tensor: StoredTensor) -> None:
            nonlocal done
            ahead.end(tensor)
            done += tensor.num_bytes
            if progress is not None:
                progress(done, total)

        with BackgroundReads(on_read) as reads:
            for tensor, view in jobs:
                stream = ahead.begin(tensor)
                if _as_stored(tensor, view):
                    reads.add(stream, tensor, _bytes_of(view))
                else:
                    reads.finish()  # there is one buffer, and an order that is told
                    _convert(stream, tensor, view, memoryview(buffer)[: tensor.num_bytes])
                    on_read(tensor)


def _as_stored(tensor: StoredTensor, view: torch.Tensor) -> bool:
    """Whether the view's memory holds the tensor as the file does."""
    return view.device.type == "cpu" and view.dtype == tensor.dtype and view.is_contiguous()


def _bytes_of(view: torch.Tensor) -> memoryview:
    """The view's own memory."""
    return view.detach().reshape(-1).view(torch.uint8).numpy().data


def _convert(stream: FileIO, tensor: StoredTensor, view: torch.Tensor, buffer: memoryview) -> None:
    read_unchecked(stream, tensor, buffer)
    check_tensor(tensor, buffer)
    stored = torch.frombuffer(buffer, dtype=tensor.dtype, count=tensor.num_bytes // tensor.dtype.itemsize)
    view.copy_(stored.view(tensor.shape))
