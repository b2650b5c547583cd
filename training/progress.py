"""How a run tells its progress: a bar on a terminal, a line now and then elsewhere."""

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from training.checkpoint import HistoryRow

LINE_EVERY = 50  # steps


class PhaseReport:
    """Shows one phase on a console while entered; `done` steps of it were taken before."""

    def __init__(self, console: Console, phase: str, num_steps: int, done: int) -> None:
        self._console = console
        self._num_steps = num_steps
        self._steps = 0  # shown here
        self._seconds = 0.0  # they took
        self._progress: Progress | None = None
        self._task = TaskID(0)
        if console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeRemainingColumn(),
                console=console,
            )
            self._task = self._progress.add_task(phase, total=num_steps, completed=done, figures="")

    def __enter__(self) -> "PhaseReport":
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def step(self, row: HistoryRow, tokens: int, seconds: float) -> None:
        """Shows one step, which had so many tokens and took so long."""
        self._steps += 1
        self._seconds += seconds
        figures = f"loss {row.loss:.3f}  balance {row.balance:.3f}  {tokens / seconds:,.0f} tokens/s"
        if self._progress is not None:
            self._progress.update(self._task, completed=row.step, figures=figures)
        elif row.step % LINE_EVERY == 0 or row.step == self._num_steps:
            left = (self._num_steps - row.step) * self._seconds / self._steps
            self._console.print(f"{row.phase}: step {row.step}/{self._num_steps}  {figures}  {left / 60:.0f} min left")
