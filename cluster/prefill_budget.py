"""How many prefill tokens a step holds beside decodes, so that running streams go on. Policy: no torch, no clock.

A step of d decodes takes about a(d) seconds, and each prefill token beside them b seconds more. Both are measured; of
the last few, the median, so that one disturbed step says nothing. With a step allowed to take `slowdown` times a(d):

    tokens = (slowdown - 1) * a(d) / b

a is measured by steps of decodes alone. Where prefills never end there would be none, and what is known of it would
grow old: so at times a step gets no prefill tokens, and whenever nothing is known.

The seconds are those of a whole step and hold what other replicas compute in it, as steps are lockstep.
"""

import statistics
from collections import deque

_KEPT = 5  # measurements, newest last
_MEASURED_AGAIN_AFTER = 15  # steps with prefills beside decodes
_FIRST_TOKENS = 16  # while it is not known what one costs
_FEWEST_TOKENS = 4  # prefills go on, whatever a token costs
_FEWEST_MEASURED = 64  # of prefills alone: a step of fewer tokens costs about as much, whatever their number


class PrefillBudget:
    """Learns from steps that were committed what the next one may hold."""

    def __init__(self, slowdown: float) -> None:
        """`slowdown` is above 1."""
        self._slowdown = slowdown
        # By number of decodes, as a power of two.
        self._alone: dict[int, deque[float]] = {}
        self._per_token: deque[float] = deque(maxlen=_KEPT)
        self._steps_beside = 0  # since the last step of decodes alone

    def tokens(self, num_decodes: int) -> int | None:
        """The most prefill tokens of a step with so many decodes, at times 0; None: as many as there are."""
        if not num_decodes:
            return None
        alone = self._alone.get(num_decodes.bit_length())
        if alone is None or self._steps_beside >= _MEASURED_AGAIN_AFTER:
            return 0
        if not self._per_token:
            return _FIRST_TOKENS
        room = (self._slowdown - 1) * statistics.median(alone)
        return max(_FEWEST_TOKENS, int(room / statistics.median(self._per_token)))

    def observe(self, num_decodes: int, num_prefill_tokens: int, seconds: float) -> None:
        """What a committed step took, above 0."""
        if not num_decodes:
            if num_prefill_tokens >= _FEWEST_MEASURED:
                self._per_token.append(seconds / num_prefill_tokens)
            return
        kind = num_decodes.bit_length()
        if not num_prefill_tokens:
            self._alone.setdefault(kind, deque(maxlen=_KEPT)).append(seconds)
            self._steps_beside = 0
            return
        self._steps_beside += 1
        more = seconds - statistics.median(self._alone[kind]) if kind in self._alone else 0.0
        if more > 0:
            self._per_token.append(more / num_prefill_tokens)
