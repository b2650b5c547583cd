"""Checkpoint directories for tests: written, cut over files, damaged, and watched while they are read."""

import io
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import save_file
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

from model_shards.weights.check import expected_shapes
from tests.reference import (
    make_hf_config,
    model_config_of,
    published_config,
    published_state_dict,
    random_hf_model,
    save_checkpoint,
)

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# Every kind of tensor: low-rank queries with biases, a dense and two expert layers, shared experts.
BRANCHES: dict[str, object] = {"q_lora_rank": 24, "attention_bias": True, "n_routed_experts": 8}


def branchy_model(**overrides: object) -> DeepseekV2ForCausalLM:
    """A small random model with every kind of tensor."""
    return random_hf_model(make_hf_config(**{**BRANCHES, **overrides}), seed=11)


@dataclass(frozen=True)
class Extent:
    """Bytes [start, end) of a file."""

    file: str
    start: int
    end: int


def write_safetensors(file: Path, header: object, data: bytes = b"") -> Path:
    """A file with this header, as JSON unless it is bytes already, whether it is valid or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return file


def write_single(directory: Path, state: Mapping[str, torch.Tensor]) -> None:
    """All tensors in one file."""
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, directory / SINGLE_FILE)


def write_indexed(directory: Path, files: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
    """Each file with its tensors, and an index that is true."""
    for file, state in files.items():
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, directory / file)
    write_index(directory, {name: file for file, state in files.items() for name in state})


def write_index(directory: Path, weight_map: Mapping[str, object]) -> None:
    """An index that says where tensors are, true or not."""
    (directory / INDEX_FILE).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))


def cut_state(state: Mapping[str, torch.Tensor], num_files: int) -> dict[str, dict[str, torch.Tensor]]:
    """Tensors dealt over files in turn, so that every role needs every file."""
    files: dict[str, dict[str, torch.Tensor]] = {f"part-{i}.safetensors": {} for i in range(num_files)}
    for position, (name, tensor) in enumerate(state.items()):
        files[f"part-{position % num_files}.safetensors"][name] = tensor
    return files


def save_model(model: DeepseekV2ForCausalLM, directory: Path, max_file_size: str | None = None) -> None:
    """As transformers writes it: one file, or several with an index."""
    if max_file_size is None:
        save_checkpoint(model, directory)
        return
    model.save_pretrained(directory, max_shard_size=max_file_size)
    (directory / "config.json").write_text(json.dumps(published_config(model.config)))


def stored_state(model: DeepseekV2ForCausalLM) -> dict[str, torch.Tensor]:
    """The tensors that a checkpoint of this model must hold; a tied head is none of them."""
    state = published_state_dict(model)
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return state


def stored_extents(directory: Path) -> dict[str, Extent]:
    """Where each tensor's bytes lie."""
    extents: dict[str, Extent] = {}
    for file in directory.glob("*.safetensors"):
        content = file.read_bytes()
        data_start = 8 + int.from_bytes(content[:8], "little")
        for name, entry in json.loads(content[8:data_start]).items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                extents[name] = Extent(file.name, data_start + begin, data_start + end)
    return extents


def header_extents(directory: Path) -> list[Extent]:
    """Where the headers lie."""
    files = directory.glob("*.safetensors")
    return [Extent(file.name, 0, 8 + int.from_bytes(file.read_bytes()[:8], "little")) for file in files]


class _WatchedFile(io.BufferedReader):
    def __init__(self, path: Path, log: list[Extent]) -> None:
        super().__init__(io.FileIO(path, "rb"))
        self._file_name, self._log = path.name, log

    def read(self, size: int | None = -1, /) -> bytes:
        start = self.tell()
        data = super().read(size)
        self._log.append(Extent(self._file_name, start, start + len(data)))
        return data

    def readinto(self, target: memoryview, /) -> int:
        start = self.tell()
        count = super().readinto(target)
        self._log.append(Extent(self._file_name, start, start + count))
        return count


@contextmanager
def watched_reads() -> Iterator[list[Extent]]:
    """What is read of *.safetensors files meanwhile, and, by position, of any; what one thread reads in order."""
    log: list[Extent] = []
    plain_open = Path.open

    def watched_open(path: Path, mode: str = "r", *args: object, **kwargs: object) -> object:
        if path.suffix == ".safetensors" and mode == "rb":
            return _WatchedFile(path, log)
        return plain_open(path, mode, *args, **kwargs)

    plain_preadv = os.preadv

    def watched_preadv(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        count = plain_preadv(descriptor, buffers, offset)
        name = Path(os.readlink(f"/proc/self/fd/{descriptor}")).name
        log.append(Extent(name, offset, offset + count))
        return count

    with mock.patch.object(Path, "open", watched_open), mock.patch.object(os, "preadv", watched_preadv):
        yield log


def merged(extents: Sequence[Extent]) -> list[Extent]:
    """The same bytes as few extents as possible, sorted; a byte named twice counts once."""
    result: list[Extent] = []
    for extent in sorted(extents, key=lambda extent: (extent.file, extent.start)):
        last = result[-1] if result else None
        if last is not None and last.file == extent.file and extent.start <= last.end:
            result[-1] = Extent(last.file, last.start, max(last.end, extent.end))
        else:
            result.append(extent)
    return result


def write_zeros(directory: Path, config: DeepseekV2Config) -> dict[str, int]:
    """A checkpoint of zeros, which takes no room on the disk; bytes of each tensor."""
    (directory / "config.json").write_text(json.dumps(published_config(config)))
    header, end = {}, 0
    for name, shape in expected_shapes(model_config_of(config)).items():
        size = 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with (directory / "model.safetensors").open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)
    return {name: entry["data_offsets"][1] - entry["data_offsets"][0] for name, entry in header.items()}
