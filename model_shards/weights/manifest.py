"""`shoal.json`: what stands in a checkpoint that `shoal shard` has cut, and the sum of every part of it.

    {"format_version": 2, "quantization": null | "int8" | "fp8",
     "config_sha256": "...", "weights_sha256": "...",           what was cut
     "files": {"expert-00000.safetensors": {"bytes": N, "sha256": "...", "header_sha256": "...",
                                            "tensors": {"model.layers.1...": "...", ...}},
               "tokenizer.json": {"bytes": N, "sha256": "..."}, ...}}

The sum of a file is SHA-256, for `sha256sum`, which is everywhere. A rank checks the sum of each tensor that it reads,
as it reads it: that one is BLAKE3, which a core computes at more than twice what a disk gives, where SHA-256 takes it
longer than reading does.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from model_shards.errors import CheckpointError
from model_shards.json_keys import JsonKeys
from model_shards.quantization import Quantization

MANIFEST_FILE = "shoal.json"
FORMAT_VERSION = 2
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class FileRecord:
    """One file as it was written."""

    num_bytes: int
    sha256: str
    header_sha256: str | None = None  # of a safetensors file: its first 8 bytes and its JSON
    tensors: Mapping[str, str] = field(default_factory=dict)  # BLAKE3 of each tensor's bytes

    def as_json(self) -> dict[str, object]:
        """The entry of the manifest."""
        entry: dict[str, object] = {"bytes": self.num_bytes, "sha256": self.sha256}
        if self.header_sha256 is not None:
            entry |= {"header_sha256": self.header_sha256, "tensors": dict(self.tensors)}
        return entry


@dataclass(frozen=True)
class CutIdentity:
    """What was cut, and how: files of two cuts may stand together only when these are equal."""

    quantization: Quantization | None
    config_sha256: str  # of the source's config.json
    weights_sha256: str  # of the source's weights, see `model_shards.cut.source`

    def as_json(self) -> dict[str, object]:
        """The first keys of the manifest."""
        return {
            "format_version": FORMAT_VERSION,
            "quantization": self.quantization,
            "config_sha256": self.config_sha256,
            "weights_sha256": self.weights_sha256,
        }


@dataclass(frozen=True)
class Manifest:
    """A whole cut."""

    identity: CutIdentity
    files: Mapping[str, FileRecord]

    def dump(self) -> str:
        """The file's text; equal manifests give equal text."""
        files = {name: record.as_json() for name, record in sorted(self.files.items())}
        return json.dumps({**self.identity.as_json(), "files": files}, indent=1) + "\n"


def read_manifest(directory: Path) -> Manifest | None:
    """None when the directory is no cut checkpoint. Raises CheckpointError naming file, key and value."""
    try:
        if not (directory / MANIFEST_FILE).exists():
            return None
    except OSError as error:  # a directory that may not be entered, a name too long
        raise CheckpointError(f"{directory / MANIFEST_FILE} cannot be read: {error.strerror}") from error
    keys = JsonKeys.read(directory / MANIFEST_FILE)
    identity = read_identity(keys)
    files = keys.section("files")
    if files is None:
        raise keys.error("files", "is missing")
    records: dict[str, FileRecord] = {}
    for name in files.values:
        entry = files.section(name)
        if entry is None or not is_bare_name(name):
            raise files.error(name, "must be the name of a file beside the manifest, with its entry")
        records[name] = read_record(entry)
    return Manifest(identity, records)


def read_identity(keys: JsonKeys) -> CutIdentity:
    """Raises CheckpointError, also for a format of another version."""
    if keys.positive("format_version") != FORMAT_VERSION:
        raise keys.error(
            "format_version",
            f"must be {FORMAT_VERSION}: cut it again with this version of Shoal, into another directory",
        )
    quantization = keys.raw("quantization")
    if quantization is not None:
        quantization = Quantization(keys.choice("quantization", tuple(Quantization)))
    return CutIdentity(quantization, _digest(keys, "config_sha256"), _digest(keys, "weights_sha256"))


def read_record(keys: JsonKeys) -> FileRecord:
    """One entry of `files`. Raises CheckpointError."""
    num_bytes, sha256 = keys.count("bytes"), _digest(keys, "sha256")
    tensors = keys.section("tensors")
    if tensors is None:
        return FileRecord(num_bytes, sha256)
    sums = {name: _digest(tensors, name, "BLAKE3 sum") for name in tensors.values}
    return FileRecord(num_bytes, sha256, _digest(keys, "header_sha256"), sums)


def is_bare_name(name: str) -> bool:
    """Whether it names a file of one directory: an index must not lead out of it."""
    return name not in ("", ".", "..") and Path(name).name == name and name.isprintable()


def _digest(keys: JsonKeys, key: str, kind: str = "SHA-256") -> str:
    value = keys.raw(key)
    if not isinstance(value, str) or not _DIGEST.fullmatch(value):
        raise keys.error(key, f"must be a {kind} of 64 hexadecimal digits")
    return value
