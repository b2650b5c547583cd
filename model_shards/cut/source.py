"""What is to be cut: its tensors, the files beside them, and sums that tell it from every other checkpoint."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from model_shards.config import ModelConfig, load_model_config
from model_shards.cut.journal import JOURNAL_FILE
from model_shards.errors import CheckpointError, ConfigError
from model_shards.quantization import Quantization
from model_shards.weights.check import Checkpoint
from model_shards.weights.header import StoredTensor
from model_shards.weights.manifest import MANIFEST_FILE, CutIdentity, is_bare_name

# Weights and their indices in any format; all other files are copied: tokenizer, template, code, licence.
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")
_SAMPLE_BYTES = 2**16


@dataclass(frozen=True)
class Source:
    """A checkpoint that was found whole. Make it with `open_source`."""

    directory: Path
    config: ModelConfig
    tensors: Mapping[str, StoredTensor]
    beside: tuple[Path, ...]  # files to copy as they are
    config_sha256: str
    weights_sha256: str

    def identity(self, quantization: Quantization | None) -> CutIdentity:
        """That of a cut of it."""
        return CutIdentity(quantization, self.config_sha256, self.weights_sha256)


def open_source(directory: Path) -> Source:
    """Checks it as a rank would; no weights are read but the few that its sum is taken over.

    Raises CheckpointError, or ConfigError when it is quantized already.
    """
    config = load_model_config(directory)
    checkpoint = Checkpoint.open(directory)
    if checkpoint.quantization is not None:
        raise ConfigError(
            f"--model must be a checkpoint that is not quantized, got {directory} in {checkpoint.quantization.value}: "
            "name the one that it was cut from"
        )
    tensors = checkpoint.tensors(config)
    try:
        beside = tuple(sorted(file for file in directory.iterdir() if _is_beside(file)))
        config_sha256 = hashlib.sha256((directory / "config.json").read_bytes()).hexdigest()
        weights_sha256 = _weights_sum(sorted({tensor.file for tensor in tensors.values()}))
    except OSError as error:
        raise CheckpointError(f"{error.filename or directory} cannot be read: {error.strerror}") from error
    return Source(directory, config, tensors, beside, config_sha256, weights_sha256)


def _is_beside(file: Path) -> bool:
    name = file.name
    if name.startswith(".") or name in (MANIFEST_FILE, JOURNAL_FILE) or name.endswith(_WEIGHT_SUFFIXES):
        return False
    return file.is_file() and is_bare_name(name)


def _weights_sum(files: list[Path]) -> str:
    """Over name, size, header and the first and last 64 KiB of the data of each file.

    Two trainings of one model have files of equal names, sizes and headers; their weights differ everywhere.
    Reading all would take as long as cutting does.
    """
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name}\n{size}\n".encode())
        with file.open("rb") as stream:
            length = stream.read(8)
            digest.update(length)
            digest.update(stream.read(int.from_bytes(length, "little") + _SAMPLE_BYTES))
            stream.seek(max(0, size - _SAMPLE_BYTES))
            digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()
