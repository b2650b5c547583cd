"""What `shoal serve` shows while it runs: bars on a terminal, plain lines elsewhere; both on stderr.

stdout carries one line, `shoal: ready ...`, for whoever started the process.
"""

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, Self

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

_MB = 1e6


class ServeUi(Protocol):
    """What the launcher tells; `loading` may be called from another thread than the rest."""

    def stage(self, text: str) -> None:
        """The next part of the start begins."""
        ...

    def loading(self, rank_name: str, done_bytes: int, total_bytes: int) -> None:
        """A rank has read this much of its slice."""
        ...

    def ready(self, grpc: str, http: str, model: str) -> None:
        """The service answers at these addresses."""
        ...

    def draining(self) -> None:
        """A signal came; requests that still run may end."""
        ...


class PlainServeUi:
    """One line an event on stderr, and how long each stage took."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._begun = clock()
        self._stages: list[tuple[str, float]] = []
        self._quarters: dict[str, int] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Nothing to put back."""

    def stage(self, text: str) -> None:
        self._stages.append((text, self._clock()))
        self._say(text)

    def loading(self, rank_name: str, done_bytes: int, total_bytes: int) -> None:
        quarter = 4 * done_bytes // max(1, total_bytes)
        with self._lock:
            if self._quarters.get(rank_name, 0) >= quarter:
                return
            self._quarters[rank_name] = quarter
        self._say(f"loading {rank_name}: {done_bytes / _MB:.1f} of {total_bytes / _MB:.1f} MB")

    def ready(self, grpc: str, http: str, model: str) -> None:
        self._say(f"started in {self._clock() - self._begun:.1f} s: {self._spent()}")
        click.echo(f"shoal: ready grpc={grpc} http={http} model={model}")

    def draining(self) -> None:
        self._say("stopping, letting running requests end; Ctrl-C again stops at once")

    def _spent(self) -> str:
        ends = [begun for _, begun in self._stages[1:]] + [self._clock()]
        return ", ".join(f"{text} {end - begun:.1f} s" for (text, begun), end in zip(self._stages, ends, strict=True))

    def _say(self, text: str) -> None:
        click.echo(f"shoal: {text}", err=True)


class TerminalServeUi(PlainServeUi):
    """A spinner for the stage and a bar for each rank, until the service is ready."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            # stdout is not the terminal's to draw on: it carries the ready line.
            redirect_stdout=False,
        )
        self._stage_task: TaskID | None = None
        self._bars: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._progress.stop()

    def stage(self, text: str) -> None:
        if self._stages:
            name, begun = self._stages[-1]
            self._progress.console.print(f"  {name}: {self._clock() - begun:.1f} s", style="dim", highlight=False)
        self._stages.append((text, self._clock()))
        if self._stage_task is not None:
            self._progress.remove_task(self._stage_task)
        self._stage_task = self._progress.add_task(text, total=None)

    def loading(self, rank_name: str, done_bytes: int, total_bytes: int) -> None:
        with self._lock:
            if rank_name not in self._bars:
                self._bars[rank_name] = self._progress.add_task(f"loading {rank_name}", total=total_bytes)
        self._progress.update(self._bars[rank_name], completed=done_bytes, total=total_bytes)

    def ready(self, grpc: str, http: str, model: str) -> None:
        self._progress.stop()
        super().ready(grpc, http, model)


def make_serve_ui() -> PlainServeUi:
    """Bars when stderr is a terminal, lines otherwise."""
    console = Console(stderr=True)
    return TerminalServeUi(console) if console.is_terminal else PlainServeUi()
