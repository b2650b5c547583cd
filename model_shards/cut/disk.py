"""Files that are there whole or not at all, and a full disk told with the numbers."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

from model_shards.errors import CapacityError, ConfigError
from model_shards.weights.memory import size_text

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_TEMPORARY = ".tmp"


@contextmanager
def whole_file(target: Path) -> Iterator[FileIO]:
    """A file under a temporary name that becomes `target` once it is on the disk; left early, it is removed.

    Raises CapacityError when the disk or a quota is full, ConfigError when the directory cannot be written.
    """
    temporary = target.with_name(f".{target.name}{_TEMPORARY}")
    with told(target):
        try:
            with temporary.open("wb", buffering=0) as stream:
                yield stream
                os.fsync(stream.fileno())
            temporary.replace(target)
            sync_directory(target.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextmanager
def told(target: Path) -> Iterator[None]:
    """Turns an OSError of writing `target` into the error that says who should act."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            free = shutil.disk_usage(target.parent).free
            raise CapacityError(
                f"{target} cannot be written, {error.strerror}: {size_text(free)} is free there. Free some, or a quota "
                "or limit of its own; the same command then goes on where it stopped"
            ) from error
        raise ConfigError(f"{target} cannot be written: {error.strerror}") from error


def write_all(stream: FileIO, data: memoryview | bytes) -> None:
    """The system may take less than was given in one write."""
    rest = memoryview(data)
    while rest:
        rest = rest[stream.write(rest) :]


def sync_directory(directory: Path) -> None:
    """After a rename: until the directory is on the disk too, a power cut may undo it."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_temporary(directory: Path) -> None:
    """What a killed run left half written."""
    for file in directory.glob(f".*{_TEMPORARY}"):
        file.unlink(missing_ok=True)


def check_room(directory: Path, needed: int, what: str) -> None:
    """Raises CapacityError, with the numbers, unless `needed` bytes fit beside what is there."""
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise CapacityError(
            f"{what} needs {size_text(needed)} on the disk of {directory}, which has {size_text(free)} free: "
            f"free {size_text(needed - free)}, or name a directory on another disk"
        )
