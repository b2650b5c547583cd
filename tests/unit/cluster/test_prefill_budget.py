"""How many prefill tokens go beside decodes, with costs that the test makes up."""

from hypothesis import given
from hypothesis import strategies as st

from cluster.prefill_budget import PrefillBudget


def run(budget: PrefillBudget, decodes: int, waiting: int, alone: float, per_token: float) -> list[tuple[int, float]]:
    """Steps until `waiting` prefill tokens are computed: of each its prefill tokens and seconds."""
    steps = []
    while waiting:
        allowed = budget.tokens(decodes)
        count = min(waiting, 2048 if allowed is None else allowed)
        seconds = (alone if decodes else 0.0) + count * per_token
        budget.observe(decodes, count, seconds)
        steps.append((count, seconds))
        waiting -= count
    return steps


@given(
    slowdown=st.floats(1.2, 4.0),
    decodes=st.integers(1, 64),
    alone=st.floats(0.01, 1.0),
    per_token=st.floats(1e-5, 1e-2),
)
def test_streams_are_not_slowed_down_more_than_allowed(slowdown, decodes, alone, per_token) -> None:
    budget = PrefillBudget(slowdown)
    run(budget, 0, 2048, 0.0, per_token)
    for _ in range(5):
        budget.observe(decodes, 0, alone)
    for count, seconds in run(budget, decodes, 8192, alone, per_token):
        assert count == 4 or seconds <= slowdown * alone * 1.0001
        # And a prompt gets all that is allowed, but for its last piece and a rounding.
    counts = [count for count, _ in run(budget, decodes, 8192, alone, per_token)]
    assert counts[0] >= min(8192, int((slowdown - 1) * alone / per_token * 0.999) - 1)


def test_without_decodes_nothing_is_held_back() -> None:
    budget = PrefillBudget(2.0)
    assert budget.tokens(0) is None
    budget.observe(0, 2048, 4.0)
    assert budget.tokens(0) is None


def test_nothing_known_means_few_tokens_and_one_step_is_enough_to_know_more() -> None:
    budget = PrefillBudget(2.0)
    assert budget.tokens(3) == 16
    budget.observe(0, 1000, 1.0)  # 1 ms a token
    assert budget.tokens(3) == 16
    budget.observe(3, 16, 0.216)  # so 200 ms without them
    assert budget.tokens(3) == 200
    # Of another number of decodes nothing is known.
    assert budget.tokens(30) == 16


def test_it_follows_a_prompt_whose_tokens_cost_more_and_more() -> None:
    budget = PrefillBudget(2.0)
    budget.observe(0, 1000, 1.0)
    for _ in range(5):
        budget.observe(8, 0, 0.2)
    assert budget.tokens(8) == 200
    for _ in range(5):
        budget.observe(8, 100, 0.2 + 100 * 4e-3)
    assert budget.tokens(8) in (49, 50)


def test_one_disturbed_step_says_nothing() -> None:
    budget = PrefillBudget(2.0)
    budget.observe(0, 1000, 1.0)
    for seconds in (0.2, 0.2, 5.0):
        budget.observe(8, 0, seconds)
    assert budget.tokens(8) == 200
    for _ in range(2):
        budget.observe(8, 100, 0.3)
    budget.observe(8, 100, 60.0)
    assert budget.tokens(8) == 200


def test_tokens_that_cost_nothing_measurable_are_not_held_back_and_divide_by_nothing() -> None:
    budget = PrefillBudget(2.0)
    for _ in range(5):
        budget.observe(8, 0, 0.2)
        budget.observe(8, 100, 0.1)
    tokens = budget.tokens(8)
    assert tokens is not None
    assert tokens > 1_000_000
