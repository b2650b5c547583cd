"""A curve: what is varied, what it costs, and the law that it must keep; and how rounds of it are measured."""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.scaling.law import Point, Verdict, judge


@dataclass(frozen=True)
class Curve:
    """Measured points and their law: `exponent` 0 is a constant, 1 a straight line in x."""

    name: str
    x: str  # what is varied
    y: str  # what it costs, with its unit
    why: str  # why the law is this one
    exponent: int
    points: tuple[Point, ...]

    def verdict(self) -> Verdict:
        """What the points say of the law."""
        return judge(self.points, self.exponent)

    def line(self) -> str:
        """One line of JSON."""
        verdict = self.verdict()
        return json.dumps(
            {
                "curve": self.name,
                "x": self.x,
                "y": self.y,
                "law": f"x^{self.exponent}",
                "why": self.why,
                "points": [[point.x, _short(point.median)] for point in self.points],
                "noise": round(max(point.noise for point in self.points), 3),
                "a": _short(verdict.law.a),
                "b": _short(verdict.law.b),
                "exponent": verdict.free.p,
                "exponent_low": round(verdict.low_exponent, 2),
                "excess": round(verdict.excess, 3),
                "flat": verdict.is_flat,
                "exceeds": verdict.exceeds,
            }
        )

    def summary(self) -> str:
        """One line for people."""
        verdict = self.verdict()
        law = f"{_short(verdict.law.a)}" + (f" + {_short(verdict.law.b)} x" if self.exponent else "")
        mark = "EXCEEDS" if verdict.exceeds else "keeps"
        grows = "flat" if verdict.is_flat else f"exponent {verdict.free.p:.2f} (from {verdict.low_exponent:.2f})"
        return (
            f"{self.name:38s} {mark:8s} law {law:20s} {grows:27s} {verdict.excess:+4.0%} "
            f"at {self.points[-1].x:g} {self.x}; {self.y}"
        )


def in_turn(xs: Sequence[int], rounds: int, measure: Callable[[int], float]) -> tuple[Point, ...]:
    """Measures every x once a round, so that a slow minute of the machine meets all of them."""
    taken: dict[int, list[float]] = {x: [] for x in xs}
    for _ in range(rounds):
        for x in xs:
            taken[x].append(measure(x))
    return tuple(Point(x, tuple(values)) for x, values in taken.items())


def quick_quartile(seconds: Sequence[float]) -> float:
    """The lower quartile: what a step costs while nobody else has the core."""
    return statistics.quantiles(seconds, n=4)[0] if len(seconds) > 1 else seconds[0]


def best_of(count: int, act: Callable[[], float]) -> float:
    """The least of `count` calls, each of which returns its seconds."""
    return min(act() for _ in range(count))


def timed(act: Callable[[], object]) -> float:
    """Seconds of one call."""
    begun = time.perf_counter()
    act()
    return time.perf_counter() - begun


def _short(value: float) -> float:
    return float(f"{value:.4g}")
