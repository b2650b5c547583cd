"""What is read in one call: tensors that lie one behind the other in a file, and where each one's bytes go."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from model_shards.weights.header import StoredTensor

# Tensors are joined until they have as much: Python takes as long for one of a few bytes as a disk for 50 KB.
RUN_BYTES = 2**20
# The system takes 1,024 places in one call.
_MOST_TENSORS = 512


@dataclass
class Run:
    """One tensor or more of `file`, `num_bytes` from `start` on."""

    file: Path
    start: int
    num_bytes: int
    tensors: list[StoredTensor]
    views: list[torch.Tensor]
    as_stored: bool  # whether the views' memory holds the tensors as the file does; else it is one tensor


def runs_of(
    jobs: Iterable[tuple[StoredTensor, torch.Tensor]], as_stored: Callable[[StoredTensor, torch.Tensor], bool]
) -> list[Run]:
    """All jobs in the order of files and places in them."""
    runs: list[Run] = []
    for tensor, view in sorted(jobs, key=lambda job: (str(job[0].file), job[0].start, job[0].num_bytes)):
        direct = as_stored(tensor, view)
        if direct and runs and _adjoins(runs[-1], tensor):
            run = runs[-1]
            run.num_bytes += tensor.num_bytes
            run.tensors.append(tensor)
            run.views.append(view)
        else:
            runs.append(Run(tensor.file, tensor.start, tensor.num_bytes, [tensor], [view], direct))
    return runs


def _adjoins(run: Run, tensor: StoredTensor) -> bool:
    return (
        run.as_stored
        and run.num_bytes < RUN_BYTES
        and len(run.tensors) < _MOST_TENSORS
        and run.start + run.num_bytes == tensor.start
        and run.file == tensor.file
    )
