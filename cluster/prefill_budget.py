"""How many prefill tokens a step holds beside decodes, so that running streams go on. Policy: no torch, no clock.

A step of d decodes takes about a(d) seconds, and each prefill token beside them b seconds more. Both are measured; of
the last few, the median, so that one disturbed step says nothing. With a step allowed to take `slowdown` times a(d):

    tokens = (slowdown - 1) * a(d) / b

The seconds are those of a whole step and hold what other replicas compute in it, as steps are lockstep.
"""

import statistics
from collections import deque

_KEPT = 5  # measurements, newest last
# Beside decodes of which nothing is known yet, and the least in any case: prefills go on whatever a token costs.
_FIRST_TOKENS = 16
_FEWEST_TOKENS = 4
_LEAST_SECONDS = 1e-6  # a step beside prefills may be measured to be shorter than those without
_FEWEST_MEASURED = 64  # of prefills alone: a step of fewer tokens costs about as much, whatever their number


class PrefillBudget:
    """Learns from steps that were committed what the next one may hold."""

    def __init__(self, slowdown: float) -> None:
        """`slowdown` is above 1."""
        self._slowdown = slowdown
        # By number of decodes, as a power of two.
        self._decodes: dict[int, deque[float]] = {}
        self._per_token: deque[float] = deque(maxlen=_KEPT)

    def tokens(self, num_decodes: int) -> int | None:
        """The most prefill tokens of a step with so many decodes; None: as many as there are."""
        if not num_decodes:
            return None
        alone = self._decodes.get(num_decodes.bit_length())
        if not alone or not self._per_token:
            return _FIRST_TOKENS
        room = (self._slowdown - 1) * statistics.median(alone)
        return max(_FEWEST_TOKENS, int(room / statistics.median(self._per_token)))

    def observe(self, num_decodes: int, num_prefill_tokens: int, seconds: float) -> None:
        """What a committed step took."""
        if not num_decodes:
            if num_prefill_tokens >= _FEWEST_MEASURED:
                self._per_token.append(seconds / num_prefill_tokens)
            return
        alone = self._decodes.setdefault(num_decodes.bit_length(), deque(maxlen=_KEPT))
        if not num_prefill_tokens:
            alone.append(seconds)
        elif not alone:
            # Always beside prefills so far: what is left of the step without these.
            per_token = statistics.median(self._per_token) if self._per_token else 0.0
            alone.append(max(seconds / 2, seconds - num_prefill_tokens * per_token))
        else:
            self._per_token.append(max(_LEAST_SECONDS, seconds - statistics.median(alone)) / num_prefill_tokens)
