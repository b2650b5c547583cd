"""Checkpoints of a run that a kill cannot tear, and the history beside them.

A checkpoint is one file, written whole under another name and then renamed. The history is one file of JSON lines
that only grows; a checkpoint says how many bytes of it belong to the steps it holds, and a resumed run cuts the rest.
"""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from model_shards.cut.disk import sync_directory
from training.errors import WorkDirError

CHECKPOINT_FILE = "checkpoint.pt"
HISTORY_FILE = "history.jsonl"


@dataclass(frozen=True)
class HistoryRow:
    """One step of training."""

    phase: str
    step: int  # steps of the phase done, this one included
    tokens: int  # seen since the run began, padding left out
    lr: float
    loss: float  # cross entropy per supervised token, nats
    expert_balance: float  # weighted, as added to the loss
    device_balance: float
    communication_balance: float
    grad_norm: float  # before clipping
    seconds: float  # spent in steps since the run began
    held_out: dict[str, float] = field(default_factory=dict)  # name of a held-out set -> loss, nats

    @property
    def balance(self) -> float:
        """The three balance losses together."""
        return self.expert_balance + self.device_balance + self.communication_balance


@dataclass
class RunState:
    """How far a run has come."""

    fingerprint: str  # of the model's shape, the data and the settings
    completed: list[str] = field(default_factory=list)  # phases that are over
    phase: str = ""  # the phase under way, or the last one
    phase_fingerprint: str = ""  # of the settings of that phase
    step: int = 0  # steps of it that are done
    tokens: int = 0
    seconds: float = 0.0
    history_bytes: int = 0


@dataclass(frozen=True)
class Tensors:
    """State dicts as torch makes them."""

    model: dict[str, torch.Tensor]
    optimizer: dict[str, object]


def save_checkpoint(directory: Path, state: RunState, tensors: Tensors) -> None:
    """Replaces the checkpoint of `directory`: after a kill or a power cut at any moment the old or the new is there."""
    target = directory / CHECKPOINT_FILE
    partial = directory / f"{CHECKPOINT_FILE}.partial"
    with partial.open("wb") as file:
        torch.save({"state": asdict(state), "model": tensors.model, "optimizer": tensors.optimizer}, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(target)
    sync_directory(directory)


def load_checkpoint(directory: Path) -> tuple[RunState, Tensors] | None:
    """The last checkpoint of `directory`; None where there is none."""
    path = directory / CHECKPOINT_FILE
    if not path.exists():
        return None
    stored = torch.load(path, map_location="cpu", weights_only=True)
    return RunState(**stored["state"]), Tensors(stored["model"], stored["optimizer"])


class History:
    """Appends rows to the history file of a work directory. Close it, or use it as a context manager."""

    def __init__(self, directory: Path, keep_bytes: int) -> None:
        path = directory / HISTORY_FILE
        self._file = path.open("ab")
        size = self._file.tell()
        if size < keep_bytes:
            self._file.close()
            raise WorkDirError(f"{path} must have {keep_bytes} bytes or more, as the checkpoint says; got {size}")
        self._file.truncate(keep_bytes)
        self._file.seek(keep_bytes)

    def append(self, row: HistoryRow) -> None:
        """Adds one row; `sync` makes it lasting."""
        self._file.write(json.dumps(asdict(row)).encode() + b"\n")

    def sync(self) -> int:
        """Puts all rows on the disk; returns the size of the file in bytes."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        self._file.close()


def read_history(directory: Path) -> list[HistoryRow]:
    """All rows of a work directory, oldest first. A kill may have torn the last one; it is left out."""
    lines = (directory / HISTORY_FILE).read_text().split("\n")[:-1]
    return [HistoryRow(**json.loads(line)) for line in lines]
