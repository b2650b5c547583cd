"""How the number of micro-batches is chosen, with costs that the test makes up."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.micro_batches import MicroBatchChooser, StepKind, StepParts, best_case, kind_of

DECODE = kind_of(32, has_prefill=False)


def run(
    chooser: MicroBatchChooser,
    steps: int,
    seconds: Callable[[int], float],
    kind: StepKind = DECODE,
    num_tokens: int = 32,
) -> list[int]:
    """The counts chosen in `steps` steps that take `seconds(count)`, and whose parts nobody knows."""
    counts = []
    for _ in range(steps):
        count = chooser.choose(kind, num_tokens)
        chooser.observe(kind, num_tokens, count, seconds(count))
        counts.append(count)
    return counts


@dataclass(frozen=True)
class Machine:
    """Seconds of a step of several micro-batches, role by role. By default each of the roles has cores of its own."""

    attention: float
    experts: float
    exchange: float
    more: float = 0.0  # what each micro-batch after the first adds to either role: weights that are read again
    shares_cores: bool = False

    def parts(self, count: int) -> StepParts:
        """As they are measured: on shared cores a role takes as long as both while they compute at once."""
        attention, experts = (part + self.more * (count - 1) for part in (self.attention, self.experts))
        alone = attention + experts + self.exchange
        seconds = max(attention, experts, alone / count)
        if self.shares_cores and count > 1:
            seconds = max(seconds, attention + experts)
            attention = experts = seconds * 0.98
        return StepParts(attention, seconds - attention, experts)

    def seconds(self, count: int) -> float:
        parts = self.parts(count)
        return parts.attention + parts.waiting

    def run(self, chooser: MicroBatchChooser, steps: int, kind: StepKind = DECODE, num_tokens: int = 32) -> list[int]:
        """The counts chosen; experts tell of a step when the next one is chosen already, as with step headers."""
        counts, told = [], None
        for _ in range(steps):
            count = chooser.choose(kind, num_tokens)
            chooser.experts_took(told)
            parts = self.parts(count)
            chooser.observe(kind, num_tokens, count, parts.attention + parts.waiting, parts.waiting)
            counts.append(count)
            told = parts.experts
        return counts


# --- parts are known --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("machine", "why"),
    [
        (Machine(attention=10.0, experts=0.2, exchange=0.2), "attention hardly waits"),
        (Machine(attention=0.2, experts=10.0, exchange=0.2), "it waits for nearly everything"),
        (Machine(attention=10.0, experts=0.3, exchange=0.0, shares_cores=True), "attention hardly waits"),
    ],
)
def test_no_step_is_wasted_on_micro_batches_where_there_is_nothing_to_overlap(machine: Machine, why: str) -> None:
    assert set(machine.run(MicroBatchChooser(3), 1000)) == {1}, why


def test_two_micro_batches_where_the_roles_take_as_long() -> None:
    machine = Machine(attention=5.0, experts=5.0, exchange=0.0)
    counts = machine.run(MicroBatchChooser(3), 1000)
    assert counts[-1] == 2
    # Three could gain nothing more, which needs no trial.
    assert 3 not in counts


def test_an_exchange_that_takes_most_of_the_time_is_hidden_by_three() -> None:
    machine = Machine(attention=2.0, experts=2.0, exchange=6.0)
    counts = machine.run(MicroBatchChooser(3), 255)
    # They promise most and are tried first; two do not promise more than three took.
    assert counts == [1, 1, *([3] * 253)]


def test_experts_that_are_slower_leave_only_what_attention_takes_to_be_hidden() -> None:
    machine = Machine(attention=3.0, experts=7.0, exchange=0.0)
    counts = machine.run(MicroBatchChooser(3), 255)
    assert counts[-1] == 2
    assert 3 not in counts


def test_weights_that_are_read_again_are_measured_and_a_third_micro_batch_is_then_not_tried() -> None:
    # Two take 9.2 in place of 10.4. By what they read twice, three take 9 at least, which is not worth a trial.
    machine = Machine(attention=5.0, experts=5.0, exchange=0.4, more=4.0)
    counts = machine.run(MicroBatchChooser(3), 255)
    assert counts == [1, 1, *([2] * 253)]
    # Where they take more than one does, one is kept.
    counts = Machine(attention=5.0, experts=5.0, exchange=0.0, more=6.0).run(MicroBatchChooser(3), 255)
    assert counts == [1, 1, 2, 2, *([1] * 251)]


def test_shared_cores_gain_nothing_and_whole_steps_say_so() -> None:
    machine = Machine(attention=5.0, experts=5.0, exchange=0.5, more=0.5, shares_cores=True)
    counts = machine.run(MicroBatchChooser(3), 255)
    # By the parts two and three look good, two as good as any; measured they are not.
    assert counts[-1] == 1
    assert counts.count(2) == 2
    assert counts.count(3) == 0


def test_a_number_that_was_not_worth_trying_is_tried_when_the_parts_change() -> None:
    chooser = MicroBatchChooser(3)
    assert set(Machine(10.0, 0.2, 0.2).run(chooser, 300)) == {1}
    assert Machine(10.0, 10.0, 0.2).run(chooser, 50)[-1] == 2


def test_a_choice_is_checked_again_at_times_but_not_against_what_cannot_win() -> None:
    chooser = MicroBatchChooser(3)
    Machine(5.0, 5.0, 0.5, more=0.5, shares_cores=True).run(chooser, 50)
    later = Machine(5.0, 5.0, 0.5, more=0.5, shares_cores=True).run(chooser, 2000)
    assert 0 < later.count(2) <= 2000 // 256 + 1
    assert later.count(3) == 0


def test_while_the_experts_time_is_not_told_all_are_tried() -> None:
    chooser = MicroBatchChooser(3)
    for _ in range(50):
        count = chooser.choose(DECODE, 32)
        chooser.observe(DECODE, 32, count, 1.0 + 0.01 * count, waited_s=0.0)
        chooser.experts_took(None)
    assert {count for count in (1, 2, 3) if chooser._records[DECODE].times_tried(count)} == {1, 2, 3}


def test_what_experts_took_is_of_the_step_observed_last_and_told_once() -> None:
    chooser = MicroBatchChooser(3)
    chooser.experts_took(1.0)
    chooser.observe(DECODE, 32, 1, 3.2, 1.6)
    assert chooser._records[DECODE].parts(1) is None
    chooser.experts_took(0.64)
    chooser.experts_took(99.0)
    parts = chooser._records[DECODE].parts(1)
    assert parts is not None
    assert (parts.attention, parts.waiting, parts.experts) == pytest.approx((0.05, 0.05, 0.02))
    assert parts.exchange == pytest.approx(0.03)


parts_of = st.floats(0.001, 10.0)


@given(st.builds(Machine, parts_of, parts_of, parts_of, parts_of), st.sampled_from([2, 3]))
def test_the_best_case_is_never_worse_than_what_is_measured(machine: Machine, count: int) -> None:
    alone = machine.parts(1)
    for below in range(1, count):
        assert best_case(alone, machine.parts(below), count) <= machine.seconds(count) * (1 + 1e-9)


@given(st.builds(Machine, parts_of, parts_of, parts_of, parts_of, st.booleans()))
def test_what_is_chosen_is_nearly_the_fastest(machine: Machine) -> None:
    chosen = machine.run(MicroBatchChooser(3), 255)[-1]
    fastest = min(machine.seconds(count) for count in (1, 2, 3))
    # What may be missed: less than what is worth a trial, and what lies past two that are clearly worse than one.
    if machine.seconds(2) <= 1.05 * machine.seconds(1):
        assert machine.seconds(chosen) * 0.95 <= fastest * (1 + 1e-9)
    assert machine.seconds(chosen) <= machine.seconds(1) * (1 + 1e-9)


# --- parts are not known ----------------------------------------------------------------------------------------------


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


# --- prefills ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mistaken", [0.6, 1.0, 1.6])
def test_chunks_of_a_long_prompt_are_compared_by_their_work_and_their_depth(mistaken: float) -> None:
    """A token costs more the deeper it is, and two micro-batches are a tenth faster, or slower, at any depth."""
    worth = 4000.0
    for costs in ((1.0, 0.9), (1.0, 1.1)):
        chooser = MicroBatchChooser(2)
        for _ in range(5):  # prompts of 32,768 tokens, one after another
            chosen = []
            for start in range(0, 32_768, 2048):
                context = start + 1024
                kind = kind_of(2048, has_prefill=True, context=context)
                chosen.append(chooser.choose(kind, 2048))
                work = 2048 * (1.0 + context / (mistaken * worth))
                seconds = 2048 * (1.0 + context / worth) * costs[chosen[-1] - 1]
                chooser.observe(kind, work, chosen[-1], seconds)
        assert set(chosen) == {1 + costs.index(min(costs))}


def test_within_a_kind_contexts_differ_by_less_than_half() -> None:
    for context in (1024, 1447, 5000, 100_000):
        kind = kind_of(512, True, context)
        assert kind != kind_of(512, True, round(context * 1.5))
        assert kind != kind_of(512, True, round(context / 1.5))
    # Nor do short prompts, to which nothing attends for long, differ.
    assert kind_of(512, True, 0) == kind_of(512, True, 900)
    assert kind_of(512, False, 0) == kind_of(512, False, 50_000)
