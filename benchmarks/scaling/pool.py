"""Light processes that act as ranks: forked from one that has torch already, so that 64 of them start in a second."""

import gc
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Generic, Self, TypeVar

import torch

_Result = TypeVar("_Result")
_PRELOAD = ["benchmarks.scaling.rank_work"]


class RankPool(Generic[_Result]):
    """`size` processes, each of which runs one function at a time; leaving the pool ends them."""

    def __init__(self, size: int) -> None:
        self._processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOAD)
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), name=f"rank-{rank}", daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def run(self, functions: Sequence[Callable[[], _Result]], timeout_s: float) -> list[_Result]:
        """The first processes run a function each, all at once. Raises RuntimeError for one that failed or was late."""
        for pipe, function in zip(self._pipes, functions, strict=False):
            pipe.send(function)
        deadline = time.monotonic() + timeout_s
        results: list[_Result] = []
        for rank, pipe in enumerate(self._pipes[: len(functions)]):
            if not wait([pipe], max(deadline - time.monotonic(), 0.0)):
                raise RuntimeError(f"rank {rank} was not done within {timeout_s:g} s")
            answer = pipe.recv()
            if isinstance(answer, _Failure):
                raise RuntimeError(f"rank {rank}: {answer.error}")
            results.append(answer)
        return results

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process, pipe in zip(self._processes, self._pipes, strict=True):
            process.kill()
            process.join()
            pipe.close()


class _Failure:
    def __init__(self, error: str) -> None:
        self.error = error


def _serve(pipe: Connection) -> None:
    torch.set_num_threads(1)
    # Else the first full collection walks, and so copies, all that torch's import made: 100 ms in some epoch of each.
    gc.freeze()
    while True:
        try:
            function = pipe.recv()
        except EOFError:
            return
        try:
            answer = function()
        except Exception as error:
            answer = _Failure(f"{type(error).__name__}: {error}")
        pipe.send(answer)


def private_bytes() -> int:
    """Memory of this process that no other has, in bytes."""
    pages = 0
    for line in Path(f"/proc/{os.getpid()}/smaps_rollup").read_text(encoding="ascii").splitlines():
        if line.startswith(("Private_Clean:", "Private_Dirty:")):
            pages += int(line.split()[1])
    return pages * 1024
