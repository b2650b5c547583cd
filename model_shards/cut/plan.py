"""Which file of a cut checkpoint holds which tensors: known to the byte before anything is written.

    attention-00000.safetensors ...   all that an attention replica reads, in the order of the layers, in files of
                                      bounded size
    expert-00000.safetensors ...      one file an expert: its three matrices of every MoE layer, layer after layer

One file an expert and not one a layer and expert: a shard holds the same experts of every layer, whichever these are,
so it reads whole files from end to end; and DeepSeek-V2 becomes 160 files of 2.8 GB and not 9,440 small ones.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from model_shards.config import ModelConfig
from model_shards.experts import ExpertShardModel
from model_shards.model import AttentionModel
from model_shards.quantization import SCALE_SUFFIX, Quantization
from model_shards.weights.header import DTYPE_NAMES, StoredTensor

ATTENTION_FILE_BYTES = 4 * 2**30


@dataclass(frozen=True)
class Entry:
    """One tensor of a file to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Its data."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Part:
    """One tensor of the source, and what it becomes."""

    source: StoredTensor
    quantization: Quantization | None  # None: its bytes, as they are

    def entries(self) -> Iterator[Entry]:
        """The tensor, and the scales that follow it when it is quantized."""
        source = self.source
        if self.quantization is None:
            yield Entry(source.name, source.dtype, source.shape)
        else:
            yield Entry(source.name, self.quantization.dtype, source.shape)
            yield Entry(source.name + SCALE_SUFFIX, torch.float32, source.shape[:1])


@dataclass(frozen=True)
class PlannedFile:
    """One safetensors file to be written."""

    name: str
    parts: tuple[Part, ...]

    def header(self) -> bytes:
        """The file up to its data. Padded to 8 bytes, as the library does; transformers asks for the metadata."""
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for part in self.parts:
            for entry in part.entries():
                begin, end = end, end + entry.num_bytes
                dtype = DTYPE_NAMES[entry.dtype]
                header[entry.name] = {"dtype": dtype, "shape": list(entry.shape), "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    @property
    def num_bytes(self) -> int:
        """The whole file."""
        return len(self.header()) + sum(entry.num_bytes for part in self.parts for entry in part.entries())

    @property
    def source_bytes(self) -> int:
        """What is read to write it."""
        return sum(part.source.num_bytes for part in self.parts)


def plan_files(
    config: ModelConfig,
    tensors: Mapping[str, StoredTensor],
    quantization: Quantization | None,
    attention_file_bytes: int = ATTENTION_FILE_BYTES,
) -> tuple[PlannedFile, ...]:
    """The files of a cut of these tensors; routed experts are quantized, all else keeps its dtype.

    A file of attention weights takes at most `attention_file_bytes` of them, or one tensor.
    """
    meta = torch.device("meta")
    groups: list[list[Part]] = []
    room = 0
    for name, _ in AttentionModel(config, torch.float32, meta).hf_slices():
        size = tensors[name].num_bytes
        if not groups or size > room:
            groups.append([])
            room = attention_file_bytes
        groups[-1].append(Part(tensors[name], None))
        room -= size
    files = [PlannedFile(f"attention-{index:05d}.safetensors", tuple(parts)) for index, parts in enumerate(groups)]
    for expert in range(config.n_routed_experts or 0):
        names = [name for name, _ in ExpertShardModel(config, (expert,), torch.float32, meta).hf_shapes()]
        parts = tuple(Part(tensors[name], quantization) for name in names)
        files.append(PlannedFile(f"expert-{expert:05d}.safetensors", parts))
    return tuple(files)
