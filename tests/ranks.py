"""Runs functions as rank processes in a test: spawned, with a deadline, and none left behind."""

import multiprocessing
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess


@dataclass(frozen=True)
class RankResult:
    """How one rank ended."""

    value: object  # what its function returned; None when it raised or died
    error: str | None  # traceback when it raised
    exit_code: int | None  # negative: the signal that ended it


def run_ranks(functions: Sequence[Callable[[], object]], deadline_s: float) -> list[RankResult]:
    """Runs each function (picklable: a module's function or a partial of one) in a process of its own.

    Raises AssertionError naming the ranks that were still running at the deadline; they are killed.
    """
    context = multiprocessing.get_context("spawn")
    processes: list[BaseProcess] = []
    pipes: list[Connection] = []
    try:
        for rank, function in enumerate(functions):
            reader, writer = context.Pipe(duplex=False)
            process: BaseProcess = context.Process(
                target=_child, args=(function, writer), name=f"rank-{rank}", daemon=True
            )
            process.start()
            writer.close()  # the child's end alone stays open, so that its death ends the pipe
            processes.append(process)
            pipes.append(reader)
        return _collect(processes, pipes, time.monotonic() + deadline_s)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()
        for pipe in pipes:
            pipe.close()


def values(results: Sequence[RankResult]) -> list[object]:
    """The returned values; raises AssertionError with the traceback of every rank that failed."""
    failed = [f"rank {rank}: exit {r.exit_code}\n{r.error}" for rank, r in enumerate(results) if r.exit_code or r.error]
    assert not failed, "\n".join(failed)
    return [result.value for result in results]


def _collect(processes: list[BaseProcess], pipes: list[Connection], deadline: float) -> list[RankResult]:
    answers: dict[int, tuple[object, str | None]] = {}
    open_ranks = set(range(len(processes)))
    while open_ranks:
        ready = wait([pipes[rank] for rank in open_ranks], timeout=max(deadline - time.monotonic(), 0))
        if not ready:
            raise AssertionError(f"ranks still running at the deadline: {sorted(open_ranks)}; answered: {answers}")
        for rank in [rank for rank in open_ranks if pipes[rank] in ready]:
            open_ranks.discard(rank)
            try:
                answers[rank] = pipes[rank].recv()
            except EOFError:  # died without a word; its exit code tells why
                answers[rank] = (None, None)
    results = []
    for rank, process in enumerate(processes):
        process.join(timeout=max(deadline - time.monotonic(), 1))
        results.append(RankResult(*answers[rank], process.exitcode))
    return results


def _child(function: Callable[[], object], writer: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    try:
        answer: tuple[object, str | None] = (function(), None)
    except BaseException:
        answer = (None, traceback.format_exc())
    writer.send(answer)
    writer.close()
