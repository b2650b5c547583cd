"""How many prefill tokens a step holds beside decodes, so that running streams go on. Policy: no torch, no clock.

A step of d decodes takes about a(d) seconds, and each prefill token beside them b seconds more. Both are measured, by
the last few steps, so that a disturbed one says nothing. With a step allowed to take `slowdown` times a(d):

    tokens = (slowdown - 1) * a(d) / b

a is measured by steps of decodes alone. Where prefills never end there would be none, and what is known of it would
grow old: so at times a step gets no prefill tokens, and whenever nothing is known.

Steps are lockstep, so another replica's prefill tokens make these decodes wait as well: d are the decodes of this
replica, the tokens are those of the whole cell. Each replica tells the others what its decodes bear, with its step
header, and they keep to it from the next step on.
"""

import statistics
from collections import deque
from dataclasses import dataclass

_KEPT = 5  # measurements, newest last
_MEASURED_AGAIN_AFTER = 15  # steps with prefills beside decodes
_FIRST_TOKENS = 16  # while it is not known what one costs
_FEWEST_TOKENS = 4  # prefills go on, whatever a token costs
_FEWEST_MEASURED = 64  # of prefills alone: a step of fewer tokens costs about as much, whatever their number


@dataclass(frozen=True)
class Elsewhere:
    """What the other attention replicas of the cell told of a step."""

    allowed: int | None = None  # prefill tokens of all the cell that their decodes bear; None: as many as there are
    num_prefill_tokens: int = 0
    num_prefilling: int = 0  # replicas that have prompts to compute, whether or not they were let

    def share_of(self, allowed: int | None) -> int | None:
        """The prefill tokens of a replica whose own decodes bear `allowed`: its part, if others have some too."""
        bounds = [bound for bound in (allowed, self.allowed) if bound is not None]
        if not bounds:
            return None
        least = min(bounds)
        return min(least, max(_FEWEST_TOKENS, least // (1 + self.num_prefilling)))


NOTHING_ELSEWHERE = Elsewhere()


class PrefillBudget:
    """Learns from steps that were committed what the next one may hold."""

    def __init__(self, slowdown: float) -> None:
        """`slowdown` is above 1."""
        self._slowdown = slowdown
        # By number of decodes, as a power of two.
        self._alone: dict[int, deque[float]] = {}
        self._per_token: deque[float] = deque(maxlen=_KEPT)
        self._steps_beside: dict[int, int] = {}  # since the last step of so many decodes alone

    def allowed(self, num_decodes: int) -> int | None:
        """The most prefill tokens of the cell beside so many decodes, at times 0; None: as many as there are."""
        if not num_decodes:
            return None
        kind = num_decodes.bit_length()
        if kind not in self._alone or self._steps_beside[kind] >= _MEASURED_AGAIN_AFTER:
            return 0
        if not self._per_token:
            return _FIRST_TOKENS
        room = (self._slowdown - 1) * self._seconds_alone(kind)
        return max(_FEWEST_TOKENS, int(room / statistics.median(self._per_token)))

    def observe(
        self, num_decodes: int, num_prefill_tokens: int, seconds: float, elsewhere: Elsewhere = NOTHING_ELSEWHERE
    ) -> None:
        """What a committed step with so many of both on this replica took, above 0; `elsewhere` is of the same step."""
        num_prefill_tokens += elsewhere.num_prefill_tokens
        if not num_decodes:
            # Beside decodes of others nothing is learned of what prefills cost by themselves.
            if elsewhere.allowed is None and num_prefill_tokens >= _FEWEST_MEASURED:
                self._per_token.append(seconds / num_prefill_tokens)
            return
        kind = num_decodes.bit_length()
        if not num_prefill_tokens:
            self._alone.setdefault(kind, deque(maxlen=_KEPT)).append(seconds)
            self._steps_beside[kind] = 0
            return
        if kind not in self._alone:
            return
        self._steps_beside[kind] += 1
        more = seconds - self._seconds_alone(kind)
        if more > 0:
            self._per_token.append(more / num_prefill_tokens)

    def _seconds_alone(self, kind: int) -> float:
        """The least: what disturbs a step only makes it longer, and fewer or shorter contexts must count at once."""
        return min(self._alone[kind])
