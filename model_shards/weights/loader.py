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
from model_shards.weights.reading import ReadAhead, read_run
from model_shards.weights.runs import Run, runs_of

# Called with (bytes read, bytes to read): before the first tensor, and each time that some were read.
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
    names = {name for name, _ in ExpertShardModel(config, experts, dtype, _META, quantization).hf_shapes()}
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
    runs = runs_of(((tensors[name], view) for name, view in slices), _as_stored)
    total = sum(run.num_bytes for run in runs)
    buffer = bytearray(max((run.num_bytes for run in runs if not run.as_stored), default=0))
    memory = _Memory()
    done = 0
    if progress is not None:
        progress(done, total)
    with ReadAhead(runs) as ahead:

        def on_read(run: Run) -> None:
            nonlocal done
            ahead.end(run)
            done += run.num_bytes
            if progress is not None:
                progress(done, total)

        with BackgroundReads(on_read) as reads:
            for run in runs:
                stream = ahead.begin(run)
                if run.as_stored:
                    reads.add(stream, run, [memory.bytes_of(view) for view in run.views])
                else:
                    reads.finish()  # there is one buffer, and an order that is told
                    _convert(stream, run, memoryview(buffer)[: run.num_bytes])
                    on_read(run)


class _Memory:
    """Views of tensors' own memory as bytes, at a tenth of what torch and numpy take to make one of each tensor."""

    def __init__(self) -> None:
        self._storages: dict[int, memoryview] = {}  # by address; each holds its storage

    def bytes_of(self, view: torch.Tensor) -> memoryview:
        """Those of a contiguous tensor on the CPU."""
        storage = view.untyped_storage()
        whole = self._storages.get(storage.data_ptr())
        if whole is None:
            whole = torch.empty(0, dtype=torch.uint8).set_(storage).numpy().data
            self._storages[storage.data_ptr()] = whole
        start = view.storage_offset() * view.itemsize
        return whole[start : start + view.nbytes]


def _as_stored(tensor: StoredTensor, view: torch.Tensor) -> bool:
    """Whether the view's memory holds the tensor as the file does."""
    return view.device.type == "cpu" and view.dtype == tensor.dtype and view.is_contiguous()


def _convert(stream: FileIO, run: Run, buffer: memoryview) -> None:
    (tensor,), (view,) = run.tensors, run.views
    read_run(stream, run.tensors, [buffer])
    stored = torch.frombuffer(buffer, dtype=tensor.dtype, count=tensor.num_bytes // tensor.dtype.itemsize)
    view.copy_(stored.view(tensor.shape))
