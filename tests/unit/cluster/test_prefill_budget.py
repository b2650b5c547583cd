"""How many prefill tokens go beside decodes, with costs that the test makes up."""

from collections.abc import Callable
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from cluster.prefill_budget import Elsewhere, PrefillBudget


def run(
    budget: PrefillBudget,
    decodes: int,
    steps: int,
    alone: Callable[[int], float],
    per_token: float,
) -> list[tuple[int, float]]:
    """Steps with always more to prefill; of each its prefill tokens and seconds."""
    done = []
    for step in range(steps):
        count = budget.allowed(decodes)
        assert count is not None
        count = min(count, 2048)
        seconds = alone(step) + count * per_token
        budget.observe(decodes, count, seconds)
        done.append((count, seconds))
    return done


@given(
    slowdown=st.floats(1.2, 4.0),
    decodes=st.integers(1, 64),
    alone=st.floats(0.01, 1.0),
    per_token=st.floats(1e-5, 1e-2),
    begins_with_prefill=st.booleans(),
)
def test_streams_are_not_slowed_down_more_than_allowed(
    slowdown, decodes, alone, per_token, begins_with_prefill
) -> None:
    budget = PrefillBudget(slowdown)
    if begins_with_prefill:
        budget.observe(0, 2048, 2048 * per_token)
    steps = run(budget, decodes, 200, lambda _: alone, per_token)
    allowed = min(2048, max(4, int((slowdown - 1) * alone / per_token * 0.999) - 1))
    for count, seconds in steps[0 if begins_with_prefill else 2 :]:
        assert count == 4 or seconds <= slowdown * alone * 1.001
    # And a prompt gets what is allowed, but for the steps that measure: none of two in a row, and few.
    counts = [count for count, _ in steps[2:]]
    assert all(count == 0 or count >= allowed for count in counts)
    assert counts.count(0) <= len(counts) // 15
    assert all(first or second for first, second in pairwise(counts))


def test_without_decodes_nothing_is_held_back() -> None:
    budget = PrefillBudget(2.0)
    assert budget.allowed(0) is None
    budget.observe(0, 2048, 4.0)
    assert budget.allowed(0) is None


def test_of_decodes_nobody_knows_one_step_is_measured_alone() -> None:
    budget = PrefillBudget(2.0)
    assert budget.allowed(3) == 0
    budget.observe(3, 0, 0.2)
    assert budget.allowed(3) == 16  # what a prefill token costs is not known
    budget.observe(3, 16, 0.216)
    assert budget.allowed(3) in (199, 200)
    assert budget.allowed(30) == 0


def test_it_follows_decodes_that_take_longer_and_longer_while_prefills_never_end() -> None:
    budget = PrefillBudget(2.0)
    budget.observe(0, 1000, 2.0)
    steps = run(budget, 8, 400, lambda step: 0.084 + 0.168 * step / 400, 2e-3)
    last = [count for count, _ in steps[-30:] if count]
    assert min(last) > 80  # of 120 that would be right


def test_it_follows_decodes_that_take_less_and_less() -> None:
    budget = PrefillBudget(2.0)
    budget.observe(0, 1000, 2.0)
    steps = run(budget, 8, 400, lambda step: 0.252 - 0.168 * step / 400, 2e-3)
    assert max(count for count, _ in steps[-30:]) < 70  # 42 would be right


def test_it_follows_a_prompt_whose_tokens_cost_more_and_more() -> None:
    budget = PrefillBudget(2.0)
    budget.observe(0, 1000, 1.0)
    budget.observe(8, 0, 0.2)
    assert budget.allowed(8) == 200
    for _ in range(5):
        budget.observe(8, 100, 0.2 + 100 * 4e-3)
    assert budget.allowed(8) in (49, 50)


def test_one_disturbed_step_says_nothing_for_long() -> None:
    budget = PrefillBudget(2.0)
    budget.observe(0, 1000, 1.0)
    budget.observe(8, 0, 5.0)  # the first of all
    counts = [count for count, _ in run(budget, 8, 100, lambda _: 0.2, 1e-3)]
    assert max(counts[50:]) <= 200
    budget.observe(8, 100, 60.0)
    assert budget.allowed(8) in (0, 199, 200)


def test_fewer_or_shorter_contexts_count_at_the_next_measurement() -> None:
    budget = PrefillBudget(2.0)
    budget.observe(0, 1000, 1.0)
    run(budget, 40, 100, lambda _: 0.5, 1e-3)
    counts = [count for count, _ in run(budget, 40, 60, lambda _: 0.1, 1e-3)]
    assert max(counts[17:]) <= 101


def test_other_numbers_of_decodes_do_not_put_off_a_measurement() -> None:
    budget = PrefillBudget(2.0)
    budget.observe(8, 0, 0.1)
    for _ in range(20):
        budget.observe(8, 4, 0.11)
        budget.observe(1, 0, 0.05)
    assert budget.allowed(8) == 0


def test_what_others_bear_bounds_a_replica_and_is_shared() -> None:
    assert Elsewhere().share_of(None) is None
    assert Elsewhere().share_of(50) == 50
    assert Elsewhere(30).share_of(None) == 30
    assert Elsewhere(30).share_of(50) == 30
    assert Elsewhere(None, 9, 1).share_of(50) == 25
    assert Elsewhere(30, 9, 2).share_of(None) == 10
    assert Elsewhere(9, 9, 9).share_of(None) == 4  # prefills go on
    assert Elsewhere(0, 9, 1).share_of(50) == 0  # a step that measures
