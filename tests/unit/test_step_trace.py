"""What the benchmark of overlap reads out of waits, on a step made up by hand."""

import pytest

from benchmarks.trace import Span, Wait, steps_of

# One layer (the last one, 1). A0 computes 0-2 and 6-8, E0 computes 2-6; then A0 8-9 and E0 8.5-9.5 overlap.
WAITS = {
    "A0": [
        Wait(Span(-1.0, 0.0), 1),
        Wait(Span(0.5, 0.6), 0),
        Wait(Span(2.0, 6.0), 1),
        Wait(Span(7.0, 7.5), 0),
        Wait(Span(9.0, 10.0), 1),
    ],
    "E0": [Wait(Span(-1.0, 2.0), 1), Wait(Span(6.0, 8.5), 1), Wait(Span(9.5, 12.0), 1)],
}


def test_a_step_lasts_from_one_last_combine_to_the_next_and_what_is_no_wait_is_computing() -> None:
    first, second = steps_of(WAITS, last_layer=1)
    assert first.span == Span(0.0, 6.0)
    assert first.computing["A0"] == (Span(0.0, 0.5), Span(0.6, 2.0))
    assert first.computing["E0"] == (Span(2.0, 6.0),)
    assert first.busy("A0") == pytest.approx(1.9)
    assert first.overlap() == 0.0
    assert second.seconds == pytest.approx(4.0)
    assert second.overlap() == pytest.approx(0.5)
