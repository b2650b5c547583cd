"""Cuts a checkpoint into a directory: file by file, each whole or not there, the manifest last.

    journal begins -> attention-*.safetensors, expert-*.safetensors, each noted -> files beside the weights
                   -> model.safetensors.index.json -> shoal.json -> journal gone

Killed anywhere, the same command does what is left and gives the same bytes. Without `shoal.json` nothing takes the
directory for a finished cut.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from model_shards.cut.disk import check_room, remove_temporary, told, whole_file, write_all
from model_shards.cut.journal import JOURNAL_FILE, Journal
from model_shards.cut.plan import ATTENTION_FILE_BYTES, PlannedFile, plan_files
from model_shards.cut.source import Source, open_source
from model_shards.cut.write import copy_beside, write_planned
from model_shards.errors import ConfigError
from model_shards.quantization import Quantization
from model_shards.weights.check import INDEX_FILE
from model_shards.weights.loader import Progress
from model_shards.weights.manifest import MANIFEST_FILE, CutIdentity, FileRecord, Manifest, read_manifest

# What the manifest, the index and the journal take for each tensor, at most.
_NOTED_BYTES = 600


@dataclass(frozen=True)
class CutReport:
    """A finished cut."""

    num_files: int  # of weights
    num_bytes: int  # of these files
    num_written: int  # files of weights that this run wrote; the others stood there


def cut_checkpoint(
    source_directory: Path,
    out: Path,
    quantization: Quantization | None = None,
    progress: Progress | None = None,
    attention_file_bytes: int = ATTENTION_FILE_BYTES,
) -> CutReport:
    """Cuts the checkpoint of `source_directory` into `out`, which is new, empty, or a cut of it that was begun.

    Holds some blocks of 1 MiB at a time, not a tensor. `progress` counts bytes of the source.

    Raises CheckpointError for a source that is not whole, ConfigError for an `out` that holds something else or belongs
    to another cut, CapacityError when the disk has too little room, which is asked before anything is written.
    """
    source = open_source(source_directory)
    planned = plan_files(source.config, source.tensors, quantization, attention_file_bytes)
    identity = source.identity(quantization)
    _prepare(source_directory, out)
    with Journal.open(out) as journal:
        manifest = read_manifest(out)
        begun = manifest.identity if manifest is not None else journal.identity
        if begun is not None:
            _check_same(out, begun, identity)
        noted = journal.records if manifest is None else manifest.files
        standing = {file.name: noted[file.name] for file in planned if _stands(out, file, noted.get(file.name))}
        pending = [file for file in planned if file.name not in standing]
        report = CutReport(len(planned), sum(file.num_bytes for file in planned), len(pending))
        if manifest is not None and not pending and _all_there(out, manifest):
            journal.discard()
            return report
        remove_temporary(out)
        check_room(out, _needed(source, planned, pending), f"what is left of the cut ({len(pending)} files)")
        journal.begin(identity, standing)
        # Something of a finished cut is gone; until it is back, it is not finished.
        (out / MANIFEST_FILE).unlink(missing_ok=True)
        _write(out, planned, pending, journal, progress)
        records = dict(journal.records)
        records |= {file.name: copy_beside(file, out) for file in source.beside}
        _finish(out, Manifest(identity, records), planned)
        journal.discard()
    return report


def _prepare(source: Path, out: Path) -> None:
    """Makes `out`. Raises ConfigError for one that holds anything but a cut."""
    with told(out):
        out.mkdir(parents=True, exist_ok=True)
        if out.resolve() == source.resolve():
            raise ConfigError(f"--out must be another directory than --model, got {out} for both")
        names = sorted(file.name for file in out.iterdir())
    if names and MANIFEST_FILE not in names and JOURNAL_FILE not in names:
        raise ConfigError(f"--out must be new, empty, or a cut that was begun; {out} holds {names[0]}")


def _check_same(out: Path, begun: CutIdentity, asked: CutIdentity) -> None:
    """Raises ConfigError unless the cut that stands in `out` is the one that is asked for."""
    remedy = "name another --out, or remove that directory"
    if begun.quantization != asked.quantization:
        had, wanted = (identity.quantization or "none" for identity in (begun, asked))
        raise ConfigError(f"{out} holds a cut whose --quantize is {had}, and {wanted} is asked for: {remedy}")
    for what, had, wanted in (
        ("config.json", begun.config_sha256, asked.config_sha256),
        ("weights", begun.weights_sha256, asked.weights_sha256),
    ):
        if had != wanted:
            raise ConfigError(
                f"{out} holds a cut of another checkpoint than --model: the sum of its {what} is {had[:16]}..., "
                f"that of --model {wanted[:16]}...: {remedy}"
            )


def _stands(out: Path, file: PlannedFile, record: FileRecord | None) -> bool:
    """Whether an earlier run has written it. Its bytes are checked when they are loaded, not here."""
    path = out / file.name
    return record is not None and path.is_file() and path.stat().st_size == record.num_bytes == file.num_bytes


def _all_there(out: Path, manifest: Manifest) -> bool:
    """Whether every file that the manifest names stands with its size."""
    files = ((out / name, record.num_bytes) for name, record in manifest.files.items())
    return all(file.is_file() and file.stat().st_size == num_bytes for file, num_bytes in files)


def _needed(source: Source, planned: tuple[PlannedFile, ...], pending: list[PlannedFile]) -> int:
    """Bytes that will be written, rounded up."""
    num_entries = sum(1 for file in planned for part in file.parts for _ in part.entries())
    beside = sum(file.stat().st_size for file in source.beside)
    return sum(file.num_bytes for file in pending) + beside + num_entries * _NOTED_BYTES


def _write(
    out: Path,
    planned: tuple[PlannedFile, ...],
    pending: list[PlannedFile],
    journal: Journal,
    progress: Progress | None,
) -> None:
    total = sum(file.source_bytes for file in planned)
    done = total - sum(file.source_bytes for file in pending)

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    advance(0)
    for file in pending:
        journal.add(file.name, write_planned(out, file, advance))


def _finish(out: Path, manifest: Manifest, planned: tuple[PlannedFile, ...]) -> None:
    """The index, which makes an unquantized cut a checkpoint for any reader of Hugging Face's layout, and the manifest.

    A quantized cut has no index: another reader would take its integers for weights.
    """
    if manifest.identity.quantization is None:
        entries = [(file.name, entry) for file in planned for part in file.parts for entry in part.entries()]
        index = {
            "metadata": {"total_size": sum(entry.num_bytes for _, entry in entries)},
            "weight_map": {entry.name: name for name, entry in sorted(entries, key=lambda item: item[1].name)},
        }
        _write_text(out / INDEX_FILE, json.dumps(index, indent=2) + "\n")
    _write_text(out / MANIFEST_FILE, manifest.dump())


def _write_text(file: Path, text: str) -> None:
    with whole_file(file) as stream:
        write_all(stream, text.encode())
