"""When a rank waited for others. What is no wait is its own computing, so the ranks' traces show what overlapped."""

import json
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from cluster.dispatch.order import Exchange
from cluster.dispatch.transport import Carrier, Link, Transport

_KEPT = 200_000  # waits, the newest


@dataclass(frozen=True)
class Wait:
    """One wait of one rank; seconds of the monotonic clock, which ranks of one host share."""

    direction: str
    layer: int
    micro_batch: int
    begin: float
    end: float


class ExchangeTrace:
    """The waits of one rank in one epoch."""

    def __init__(self, rank_name: str) -> None:
        self._rank_name = rank_name
        self._waits: deque[Wait] = deque(maxlen=_KEPT)

    def record(self, exchange: Exchange, begin: float, end: float) -> None:
        """From the rank's own thread."""
        self._waits.append(Wait(exchange.direction.value, exchange.layer, exchange.micro_batch, begin, end))

    def write(self, directory: Path, epoch: int) -> None:
        """As Chrome's trace events (chrome://tracing, Perfetto), one file a rank and epoch. Raises OSError."""
        events = [
            {
                "name": f"wait for {wait.direction} of layer {wait.layer}",
                "cat": wait.direction,
                "ph": "X",
                "ts": wait.begin * 1e6,
                "dur": (wait.end - wait.begin) * 1e6,
                "pid": self._rank_name,
                "tid": 0,
                "args": {"layer": wait.layer, "micro_batch": wait.micro_batch},
            }
            for wait in self._waits
        ]
        directory.mkdir(parents=True, exist_ok=True)
        file = directory / f"{self._rank_name}-epoch-{epoch}.json"
        file.write_text(json.dumps({"traceEvents": events}), encoding="utf-8")


class TracedLink(Link):
    """A link whose waits are recorded."""

    is_traced = True

    def __init__(self, transport: Transport, epoch: int, rank_name: str, trace: ExchangeTrace) -> None:
        super().__init__(transport, epoch, rank_name)
        self._trace = trace

    def end(self, exchange: Exchange, carrier: Carrier) -> None:
        """See `Link`."""
        begin = time.monotonic()
        super().end(exchange, carrier)
        self._trace.record(exchange, begin, time.monotonic())
