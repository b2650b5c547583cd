"""What a run has finished, so that the next one goes on there: one line of JSON when a file stands on the disk.

The file is also the lock: while a run holds it, a second one is refused. A line that was cut off by a kill counts as
not written; its file is cut again, to the same bytes.
"""

import fcntl
import json
import os
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import Self

from model_shards.cut.disk import sync_directory, told, write_all
from model_shards.errors import CheckpointError, ConfigError
from model_shards.json_keys import JsonKeys
from model_shards.weights.manifest import CutIdentity, FileRecord, read_identity, read_record

JOURNAL_FILE = "shoal.partial.jsonl"


class Journal:
    """The journal of one output directory, open and locked from `open` to the end of its `with`."""

    def __init__(self, file: Path, stream: FileIO) -> None:
        self._file = file
        self._stream = stream
        self._identity, self.records, valid = _parse(file, stream.readall())
        with told(file):
            stream.truncate(valid)
            stream.seek(valid)

    @classmethod
    def open(cls, directory: Path) -> Self:
        """Raises ConfigError while another run holds it, CheckpointError when it is damaged."""
        file = directory / JOURNAL_FILE
        with told(file):
            stream = FileIO(os.open(file, os.O_RDWR | os.O_CREAT, 0o644), "r+")
        try:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(f"another `shoal shard` writes to {directory} now: wait for its end") from None
            return cls(file, stream)
        except BaseException:
            stream.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """A journal of nothing is not left behind."""
        if not self.records:
            self.discard()
        self._stream.close()

    @property
    def identity(self) -> CutIdentity | None:
        """What the run that began it cut; None for a new one."""
        return self._identity

    def begin(self, identity: CutIdentity, records: Mapping[str, FileRecord]) -> None:
        """Makes it a journal of this cut, in which the files of `records` stand."""
        self._identity, self.records = identity, dict(records)
        with told(self._file):
            self._stream.seek(0)
            self._stream.truncate()
        self._append([identity.as_json(), *(_line(name, record) for name, record in records.items())])
        sync_directory(self._file.parent)

    def add(self, name: str, record: FileRecord) -> None:
        """A file stands on the disk."""
        self._append([_line(name, record)])
        self.records[name] = record

    def discard(self) -> None:
        """The manifest has taken its place."""
        self._file.unlink(missing_ok=True)

    def _append(self, lines: list[dict[str, object]]) -> None:
        with told(self._file):
            write_all(self._stream, b"".join(json.dumps(line).encode() + b"\n" for line in lines))
            os.fsync(self._stream.fileno())


def _line(name: str, record: FileRecord) -> dict[str, object]:
    return {"file": name, **record.as_json()}


def _parse(file: Path, content: bytes) -> tuple[CutIdentity | None, dict[str, FileRecord], int]:
    """Identity, records, and how many bytes of the file are whole lines."""
    *lines, _ = content.split(b"\n")
    identity: CutIdentity | None = None
    records: dict[str, FileRecord] = {}
    for number, line in enumerate(lines, start=1):
        keys = JsonKeys(f"{file} line {number}", _object(file, number, line))
        if identity is None:
            identity = read_identity(keys)
        else:
            records[str(keys.raw("file"))] = read_record(keys)
    return identity, records, sum(len(line) + 1 for line in lines)


def _object(file: Path, number: int, line: bytes) -> dict[str, object]:
    try:
        values: object = json.loads(line)
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} line {number} is damaged; remove the directory and cut it again")
    return values
