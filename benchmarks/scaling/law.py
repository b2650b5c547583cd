"""Whether a measured cost grows faster than its law allows.

A law is y = a + b * x^k with a known k: 0 (constant) or 1 (a straight line). Beside it y = a + b * x^p with a free p is
fitted, and both are told; for a constant a is 0 there, since with a floor a rise of a few per cent has any exponent.
A curve exceeds its law when both hold:

    the exponent   of the free fit lies above k + 0.2, even at the low end of what the rounds' noise leaves open
    the excess     what the largest x cost over what the law, fitted to all points, says of it, is above 15 % and above
                   twice the noise of a point

The first alone would blame a curve for growth that nobody could measure, the second one for a single bad point.
"""

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_EXPONENTS = tuple(round(0.05 * step, 2) for step in range(1, 61))  # 0.05 .. 3.0
_EXPONENT_SLACK = 0.2
_EXCESS_SLACK = 0.15
_RESAMPLES = 60
_LOW_PERCENTILE = 5.0
_MIN_ROUNDS = 3  # below it a point tells nothing of its noise

_Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Point:
    """One x and what it cost in each round."""

    x: float
    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The cost."""
        return statistics.median(self.rounds)

    @property
    def noise(self) -> float:
        """Of the median, relative to it: half the spread of the rounds over the root of their number."""
        if len(self.rounds) < _MIN_ROUNDS or not self.median:
            return 0.0
        return (max(self.rounds) - min(self.rounds)) / 2 / math.sqrt(len(self.rounds)) / self.median


@dataclass(frozen=True)
class Fit:
    """y = a + b * x^p."""

    a: float
    b: float
    p: float

    def at(self, x: float) -> float:
        """What the fit says of x."""
        return self.a + self.b * float(x**self.p)


@dataclass(frozen=True)
class Verdict:
    """What the points of one curve say about its law."""

    law: Fit
    free: Fit
    low_exponent: float  # what the noise leaves open, downwards
    excess: float  # of the largest x over the law, relative
    exceeds: bool
    is_flat: bool  # the largest x costs about what the smallest does, so the free exponent says nothing


def judge(points: Sequence[Point], exponent: int) -> Verdict:
    """Compares `points` (3 at least, x > 0, ascending) with the law of that exponent."""
    xs = np.array([point.x for point in points], np.float64)
    ys = np.array([point.median for point in points], np.float64)
    law = fit(xs, ys, float(exponent))
    free = _free_fit(xs, ys, exponent)
    low = _low_exponent(points, xs, free.p, exponent)
    excess = float(ys[-1] / max(law.at(float(xs[-1])), 1e-300) - 1)
    noise = max(point.noise for point in points)
    slack = max(_EXCESS_SLACK, 2 * noise)
    exceeds = low > exponent + _EXPONENT_SLACK and excess > slack
    return Verdict(law, free, low, excess, exceeds, is_flat=abs(float(ys[-1] / ys[0]) - 1) <= slack)


def fit(xs: _Floats, ys: _Floats, p: float) -> Fit:
    """Least squares of the relative errors with a, b >= 0; p = 0 is a constant."""
    if p == 0:
        return Fit(_ratio(1 / ys, 1 / ys**2), 0.0, 0.0)
    powers = xs**p
    design = np.stack([1 / ys, powers / ys], axis=1)
    (a, b), *_ = np.linalg.lstsq(design, np.ones_like(ys), rcond=None)
    if a < 0:
        a, b = 0.0, _ratio(powers / ys, (powers / ys) ** 2)
    elif b < 0:
        a, b = _ratio(1 / ys, 1 / ys**2), 0.0
    return Fit(float(a), float(b), p)


def _ratio(numerator: _Floats, denominator: _Floats) -> float:
    return float(numerator.sum() / denominator.sum())


def _free_fit(xs: _Floats, ys: _Floats, exponent: int) -> Fit:
    if exponent == 0:
        slope, intercept = np.polyfit(np.log(xs), np.log(ys), 1)
        return Fit(0.0, float(np.exp(intercept)), round(float(slope), 2))
    fits = [fit(xs, ys, p) for p in _EXPONENTS]
    errors = [sum((found.at(float(x)) / y - 1) ** 2 for x, y in zip(xs, ys, strict=True)) for found in fits]
    # Where several fit as well the smallest is told: a flat curve has none of its own.
    best = min(errors)
    return next(found for found, error in zip(fits, errors, strict=True) if error <= best * 1.001 + 1e-12)


def _low_exponent(points: Sequence[Point], xs: _Floats, measured: float, exponent: int) -> float:
    """The 5th percentile of the free exponent over resampled rounds."""
    if any(len(point.rounds) < _MIN_ROUNDS for point in points):
        return measured
    draw = random.Random(0)
    found = []
    for _ in range(_RESAMPLES):
        ys = [statistics.median(draw.choices(point.rounds, k=len(point.rounds))) for point in points]
        found.append(_free_fit(xs, np.array(ys, np.float64), exponent).p)
    return float(np.percentile(found, _LOW_PERCENTILE))
