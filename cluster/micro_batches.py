"""Into how many micro-batches a step is cut, from what steps were measured to take. Policy: no torch, no clock.

More micro-batches hide the exchange and the other role's computing (`model_shards.pipeline`), and cost: each of them
reads every weight again. What wins depends on the machine, the numbers of ranks and the step, so it is tried. But a
trial costs two steps of each kind, and the parts of a step tell where none can gain:

    one         A A A . x E E x . A A A . x E E x . ...      A attention, E experts, x exchange, of all layers
    several     the two roles each compute A and E in all, the same as before or more, now at once; and a micro-batch
                that is 1/k of the step takes no less than 1/k of the time that the step takes alone:

    seconds of k micro-batches >= max(A, E, (A + waiting) / k)

That is `best_case`. With the A and E of fewer micro-batches than k it holds as well, since none reads less for being
more. One that does not promise to beat the best is not tried. Of the others the most promising is tried first, of those
about as good the fewest, and then what counts is a step's time as a whole: parts do not know which ranks share cores,
nor what an exchange costs however few its rows are.

A step's time holds the other replicas' work too, since ranks run in lockstep, while a kind of step is that of this
replica alone: with several replicas a choice can be off for as long as the others' load happens to differ between
trials.
"""

from collections import deque
from dataclasses import dataclass, field

_KEPT = 5  # measurements of one count, newest last
_FIRST_TRIALS = 2  # the first one of a count also sizes its buffers
_TRIED_AGAIN_AFTER = 256  # steps of a kind
_CLEARLY_WORSE = 1.05
_WORTH_TRYING = 0.95  # of the best that was measured: what a best case is to be below
_ABOUT_AS_GOOD = 1.1  # of the best best case: up to there the fewest are tried first
_SHALLOW = 1024  # tokens of context, below which it does not matter how many they are


@dataclass(frozen=True)
class StepKind:
    """Steps that cost alike; times are compared among these alone."""

    has_prefill: bool
    size: int  # tokens, as a power of two
    depth: int = 0  # context of the prefills, as a power of the root of two; 0: shallow


def kind_of(num_tokens: int, has_prefill: bool, context: int = 0) -> StepKind:
    """The kind of a step with `num_tokens` > 0. `context`: tokens that a token of its prefills attends to, on average.

    Deep contexts leave more to attention and less to be hidden; besides, `cluster.step_work` knows what they cost only
    by and large, so that times are compared among contexts that differ by little.
    """
    depth = (context * context).bit_length() if has_prefill and context >= _SHALLOW else 0
    return StepKind(has_prefill, num_tokens.bit_length(), depth)


@dataclass(frozen=True)
class StepParts:
    """Seconds of one step."""

    attention: float  # in which the attention rank did not wait
    waiting: float  # of the attention rank, for what comes back from the experts
    experts: float  # in which the slowest expert rank did not wait

    @property
    def exchange(self) -> float:
        """What the experts' work does not explain of the waiting: of use for a step that is one micro-batch."""
        return max(0.0, self.waiting - self.experts)


def best_case(alone: StepParts, fewer: StepParts, count: int) -> float:
    """The least seconds that a step of `count` micro-batches can take, from the parts of the step as one, and as some
    number of them below `count`: see the top of the file."""
    return max(fewer.attention, fewer.experts, (alone.attention + alone.waiting) / count)


@dataclass
class _Measured:
    """One step, by its work."""

    seconds: float
    waited: float | None  # None: it cannot be told from the rest
    experts: float | None = None  # told later, or never


@dataclass
class _Record:
    """What is known of one kind, by number of micro-batches."""

    steps: dict[int, deque[_Measured]] = field(default_factory=dict)
    num_steps: int = 0
    next_trial: int = 0

    def times_tried(self, count: int) -> int:
        """As far as it matters."""
        return len(self.steps.get(count, ()))

    def seconds(self, count: int) -> float:
        """The least: what disturbs a step only makes it longer."""
        return min(measured.seconds for measured in self.steps[count])

    def parts(self, count: int) -> StepParts | None:
        """Of the fastest step whose parts are known."""
        known = [
            (measured.seconds, measured.waited, measured.experts)
            for measured in self.steps.get(count, ())
            if measured.waited is not None and measured.experts is not None
        ]
        if not known:
            return None
        seconds, waited, experts = min(known)
        return StepParts(seconds - waited, waited, experts)

    def best_case(self, count: int) -> float:
        """Seconds by work; 0 where parts are not known."""
        alone = self.parts(1)
        if alone is None:
            return 0.0
        fewer = [parts for below in range(1, count) if (parts := self.parts(below)) is not None]
        return best_case(alone, fewer[-1], count)

    def promising(self, count: int, best: int) -> bool:
        """Whether more than one micro-batch, so many, may take less than the best number so far."""
        goal = self.seconds(best)
        # Past one that is clearly worse they are worse yet.
        for below in range(2, count):
            if self.times_tried(below) >= _FIRST_TRIALS and self.seconds(below) > _CLEARLY_WORSE * goal:
                return False
        return self.best_case(count) < _WORTH_TRYING * goal


class MicroBatchChooser:
    """Tries one micro-batch and, for each kind of step, the numbers of them that promise more; keeps the fastest, and
    tries the others again at times."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._records: dict[StepKind, _Record] = {}
        self._last: tuple[_Measured, float] | None = None  # whose experts are not known yet, and its work

    def choose(self, kind: StepKind, num_tokens: int) -> int:
        """1 to `most`, and no more than there are tokens. Changes nothing: a step may be lost and chosen for again."""
        record = self._records.get(kind, _Record())
        if record.times_tried(1) < _FIRST_TRIALS:
            return 1
        counts = range(1, min(self._most, num_tokens) + 1)
        best = min((count for count in counts if record.times_tried(count)), key=record.seconds)
        worth = [count for count in counts if count in (1, best) or record.promising(count, best)]
        untried = [count for count in worth if record.times_tried(count) < _FIRST_TRIALS]
        if untried:
            # Each costs a little that parts do not tell.
            least = min(map(record.best_case, untried))
            return next(count for count in untried if record.best_case(count) <= _ABOUT_AS_GOOD * least)
        if record.num_steps % _TRIED_AGAIN_AFTER == 0:
            return worth[record.next_trial % len(worth)]
        return best

    def observe(self, kind: StepKind, work: float, count: int, seconds: float, waited_s: float | None = None) -> None:
        """What a step that was committed took, and how much of it the attention rank waited, if that is known. `work`
        is above 0 (`cluster.step_work`), `count` is what was chosen for it. What the experts took may follow
        (`experts_took`) before the next step is observed."""
        record = self._records.setdefault(kind, _Record())
        if record.num_steps % _TRIED_AGAIN_AFTER == 0:
            record.next_trial += 1
        record.num_steps += 1
        measured = _Measured(seconds / work, None if waited_s is None else waited_s / work)
        record.steps.setdefault(count, deque(maxlen=_KEPT)).append(measured)
        self._last = measured, work

    def experts_took(self, seconds: float | None) -> None:
        """What the slowest expert rank computed in the step that was observed last; None: nobody knows."""
        if self._last is not None and seconds is not None:
            measured, work = self._last
            measured.experts = seconds / work
        self._last = None
