"""How the number of micro-batches is chosen, with costs that the test makes up."""

from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from cluster.micro_batches import MicroBatchChooser, StepKind, kind_of

DECODE = kind_of(32, has_prefill=False)


def run(
    chooser: MicroBatchChooser,
    steps: int,
    seconds: Callable[[int], float],
    kind: StepKind = DECODE,
    num_tokens: int = 32,
) -> list[int]:
    """The counts chosen in `steps` steps that take `seconds(count)`."""
    counts = []
    for _ in range(steps):
        count = chooser.choose(kind, num_tokens)
        chooser.observe(kind, num_tokens, count, seconds(count))
        counts.append(count)
    return counts


@given(costs=st.permutations([1.0, 1.04, 1.3]))
def test_the_fastest_is_found_and_kept(costs: list[float]) -> None:
    chooser = MicroBatchChooser(3)
    run(chooser, 10, lambda count: costs[count - 1])
    counts = run(chooser, 200, lambda count: costs[count - 1])
    best = costs.index(1.0) + 1
    # 3 is not even tried while 2 is clearly worse than 1.
    reachable = best != 3 or costs[1] <= 1.05 * costs[0]
    assert set(counts) == {best if reachable else 1}


def test_one_that_is_clearly_worse_costs_two_steps_and_those_past_it_none() -> None:
    counts = run(MicroBatchChooser(3), 100, lambda count: float(count))
    assert counts.count(2) == 2
    assert counts.count(3) == 0


def test_a_choice_is_made_again_when_the_machine_changes() -> None:
    chooser = MicroBatchChooser(2)
    assert run(chooser, 100, lambda count: (1.0, 2.0)[count - 1])[-1] == 1
    counts = run(chooser, 2000, lambda count: (1.0, 0.5)[count - 1])
    assert counts[-1] == 2
    # Found at one of the next two trials, and from then on the other is only tried.
    found = counts.index(2)
    assert 0 < found <= 512
    assert 0 < counts[found:].count(1) <= len(counts) // 256


def test_one_slow_step_does_not_change_the_choice() -> None:
    chooser = MicroBatchChooser(2)
    run(chooser, 20, lambda count: (1.0, 1.2)[count - 1])
    chooser.observe(DECODE, 32, 1, 50.0)
    assert chooser.choose(DECODE, 32) == 1


def test_kinds_of_steps_are_judged_by_themselves() -> None:
    chooser = MicroBatchChooser(2)
    prefill = kind_of(32, has_prefill=True)
    assert run(chooser, 20, lambda count: (1.0, 2.0)[count - 1])[-1] == 1
    assert run(chooser, 20, lambda count: (2.0, 1.0)[count - 1], prefill)[-1] == 2
    assert chooser.choose(DECODE, 32) == 1


def test_there_are_never_more_micro_batches_than_tokens() -> None:
    chooser = MicroBatchChooser(3)
    kind = kind_of(1, has_prefill=False)
    assert set(run(chooser, 20, lambda count: 1.0 / count, kind, 1)) == {1}


def test_choosing_changes_nothing_so_a_lost_step_may_be_chosen_for_again() -> None:
    chooser = MicroBatchChooser(3)
    for _ in range(10):
        assert chooser.choose(DECODE, 32) == 1
