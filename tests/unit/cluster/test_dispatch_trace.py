"""The waits that a traced link records, and what a reader sees of them."""

import json
import time
from pathlib import Path

import pytest
import torch

from cluster.dispatch.order import Direction, Exchange
from cluster.dispatch.trace import ExchangeTrace, TracedLink
from cluster.dispatch.transport import Carrier, Lane
from cluster.waiting import WaitTally
from model_shards.errors import EpochAbortedError

NOTHING = Lane(torch.empty(0, dtype=torch.uint8), torch.empty(0, dtype=torch.uint8), [], [])


class SlowTransport:
    """Ends an exchange after a while, or with an error."""

    def __init__(self, error: Exception | None = None) -> None:
        self._error = error
        self.waited = WaitTally()

    def carrier(self, lane: Lane) -> Carrier:
        return SlowCarrier(self._error)


class SlowCarrier:
    def __init__(self, error: Exception | None) -> None:
        self._error = error

    def start(self) -> None:
        pass

    def end(self) -> None:
        time.sleep(0.02)
        if self._error is not None:
            raise self._error


def events(file: Path) -> list[dict[str, object]]:
    found: list[dict[str, object]] = json.loads(file.read_text())["traceEvents"]
    return found


def test_each_wait_is_an_event_of_its_rank_in_the_order_of_time(tmp_path: Path) -> None:
    trace = ExchangeTrace("E1")
    link = TracedLink(SlowTransport(), 4, "E1", trace)
    for layer in (1, 2):
        exchange, carrier = Exchange(Direction.DISPATCH, layer, 0), link.carrier(NOTHING)
        link.start(exchange, carrier)
        link.end(exchange, carrier)
    trace.write(tmp_path / "traces", 4)
    first, second = events(tmp_path / "traces" / "E1-epoch-4.json")
    assert (first["name"], first["pid"]) == ("wait for dispatch of layer 1", "E1")
    assert second["args"] == {"layer": 2, "micro_batch": 0}
    for event in (first, second):
        assert isinstance(event["dur"], float)
        assert event["dur"] >= 0.02e6
    assert isinstance(first["ts"], float)
    assert isinstance(first["dur"], float)
    assert isinstance(second["ts"], float)
    assert first["ts"] + first["dur"] <= second["ts"]


def test_an_exchange_that_fails_fails_as_without_a_trace(tmp_path: Path) -> None:
    trace = ExchangeTrace("A0")
    link = TracedLink(SlowTransport(RuntimeError("rank E0 sent nothing in time")), 4, "A0", trace)
    exchange, carrier = Exchange(Direction.COMBINE, 3, 1), link.carrier(NOTHING)
    link.start(exchange, carrier)
    with pytest.raises(EpochAbortedError, match=r"combine of layer 3, micro-batch 1, epoch 4 on rank A0.*in time"):
        link.end(exchange, carrier)
    trace.write(tmp_path, 4)
    assert events(tmp_path / "A0-epoch-4.json") == []
