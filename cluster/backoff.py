"""How long the coordinator waits before it forms an epoch again after one that failed by itself.

A lost rank is no reason to wait: its replacement is. But an error that comes again with every epoch must not make the
cell form epochs as fast as it can.
"""

from collections.abc import Callable

_FIRST_S = 0.2
_LONGEST_S = 5.0
_SOUND_S = 30.0  # an epoch that ran so long shows that the trouble of before is over


class EpochBackoff:
    """The pause doubles with each failed epoch, and is forgotten after one that ran for a while."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._pause_s = 0.0
        self._running_since: float | None = None
        self._failed_epoch = 0
        self._is_due = False

    def epoch_runs(self) -> None:
        """Call when an epoch begins to run."""
        self._running_since = self._clock()

    def epoch_failed(self, epoch: int) -> None:
        """Call when an epoch failed by itself; once more for the same epoch changes nothing."""
        if epoch == self._failed_epoch:
            return
        if self._running_since is not None and self._clock() - self._running_since >= _SOUND_S:
            self._pause_s = 0.0
        self._failed_epoch, self._running_since, self._is_due = epoch, None, True
        self._pause_s = min(max(_FIRST_S, 2 * self._pause_s), _LONGEST_S)

    def take(self) -> float:
        """Seconds to wait now; 0 until the next failure."""
        due, self._is_due = self._is_due, False
        return self._pause_s if due else 0.0
