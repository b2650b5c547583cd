"""A curve is blamed for growing faster than its law, and for nothing else."""

import random

import pytest

from benchmarks.scaling.law import Point, judge

XS = (2, 4, 8, 16, 32, 64)


def points(cost, noise=0.05, rounds=5, xs=XS):
    draw = random.Random(7)
    return [Point(x, tuple(cost(x) * (1 + draw.uniform(-noise, noise)) for _ in range(rounds))) for x in xs]


@pytest.mark.parametrize(
    "cost", [lambda x: 3 * x, lambda x: 50 + 2 * x, lambda x: 1000 + 0.1 * x, lambda x: 10 + x**0.5]
)
def test_a_straight_line_and_what_grows_slower_keep_the_linear_law(cost):
    assert not judge(points(cost), 1).exceeds


@pytest.mark.parametrize("cost", [lambda x: x**2, lambda x: 20 + x**2, lambda x: 50 * x + x**2, lambda x: 3 * x**1.5])
def test_what_grows_faster_than_a_line_exceeds_the_linear_law(cost):
    assert judge(points(cost), 1).exceeds


def test_a_constant_keeps_its_law_and_a_line_exceeds_it():
    assert not judge(points(lambda x: 40), 0).exceeds
    assert judge(points(lambda x: 4 + 0.5 * x), 0).exceeds


def test_a_rise_by_a_few_per_cent_over_the_whole_range_keeps_the_constant_law():
    verdict = judge(points(lambda x: 2 * x**0.08, noise=0.01), 0)
    assert not verdict.exceeds
    assert not verdict.is_flat


def test_what_costs_the_same_everywhere_is_flat_whatever_the_free_exponent():
    assert judge(points(lambda x: 40), 1).is_flat
    assert not judge(points(lambda x: 40 + x), 1).is_flat


def test_one_bad_round_of_the_largest_point_is_not_growth():
    measured = points(lambda x: 30 + 2 * x)
    spoilt = (*measured[-1].rounds[:-1], 10 * measured[-1].rounds[-1])
    assert not judge([*measured[:-1], Point(measured[-1].x, spoilt)], 1).exceeds


def test_the_fits_tell_floor_slope_and_exponent():
    verdict = judge(points(lambda x: 50 + 3 * x, noise=0.0), 1)
    assert verdict.law.a == pytest.approx(50)
    assert verdict.law.b == pytest.approx(3)
    assert verdict.free.p == pytest.approx(1.0)
    assert judge(points(lambda x: 7 + 2 * x**2, noise=0.0), 1).free.p == pytest.approx(2.0)


def test_counts_without_noise_are_judged_by_their_one_round():
    assert not judge([Point(x, (2 * x,)) for x in XS], 1).exceeds
    assert judge([Point(x, (x * (x - 1),)) for x in XS], 1).exceeds
