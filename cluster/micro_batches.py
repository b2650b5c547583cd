"""Into how many micro-batches a step is cut, from what steps were measured to take. Policy: no torch, no clock.

More micro-batches hide the exchange and the other role's computing (`model_shards.pipeline`), and cost: each of them
reads every weight again. What wins depends on the machine, the numbers of ranks and the step, so it is tried. A step's
time is taken as a whole: it holds attention, exchange and experts with all that overlaps, which is what counts.

It holds the other replicas' work too, since ranks run in lockstep, while a kind of step is that of this replica alone:
with several replicas a choice can be off for as long as the others' load happens to differ between trials.
"""

from collections import deque
from dataclasses import dataclass, field

_KEPT = 5  # measurements of one count, newest last
_FIRST_TRIALS = 2  # the first one of a count also sizes its buffers
_TRIED_AGAIN_AFTER = 256  # steps of a kind
_CLEARLY_WORSE = 1.05


@dataclass(frozen=True)
class StepKind:
    """Steps that cost alike; times are compared among these alone."""

    has_prefill: bool
    size: int  # tokens, as a power of two


def kind_of(num_tokens: int, has_prefill: bool) -> StepKind:
    """The kind of a step with `num_tokens` > 0."""
    return StepKind(has_prefill, num_tokens.bit_length())


@dataclass
class _Record:
    """What is known of one kind: seconds per token by number of micro-batches."""

    seconds: dict[int, deque[float]] = field(default_factory=dict)
    num_steps: int = 0
    next_trial: int = 0

    def best_of(self, count: int) -> float:
        """The least: what disturbs a step only makes it longer."""
        return min(self.seconds[count])


class MicroBatchChooser:
    """Tries 1, 2, ... micro-batches for each kind of step, keeps the fastest, and tries the others again at times."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._records: dict[StepKind, _Record] = {}

    def choose(self, kind: StepKind, num_tokens: int) -> int:
        """1 to `most`, and no more than there are tokens. Changes nothing: a step may be lost and chosen for again."""
        record = self._records.get(kind, _Record())
        counts = range(1, min(self._most, num_tokens) + 1)
        untried = self._untried(record, counts)
        if untried is not None:
            return untried
        tried = [count for count in counts if count in record.seconds]
        if record.num_steps % _TRIED_AGAIN_AFTER == 0:
            return tried[record.next_trial % len(tried)]
        return min(tried, key=record.best_of)

    def observe(self, kind: StepKind, num_tokens: int, count: int, seconds: float) -> None:
        """What a step that was committed took; `count` is what was chosen for it."""
        record = self._records.setdefault(kind, _Record())
        if record.num_steps % _TRIED_AGAIN_AFTER == 0:
            record.next_trial += 1
        record.num_steps += 1
        record.seconds.setdefault(count, deque(maxlen=_KEPT)).append(seconds / num_tokens)

    def _untried(self, record: _Record, counts: range) -> int | None:
        """The next count to be tried for the first time; those past one that is clearly worse are not."""
        for count in counts:
            if len(record.seconds.get(count, ())) < _FIRST_TRIALS:
                return count
            if count > 1 and record.best_of(count) > _CLEARLY_WORSE * record.best_of(count - 1):
                return None
        return None
