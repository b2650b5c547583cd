"""The learning rate over a phase."""

import pytest

from training.schedule import learning_rate


def test_the_rate_grows_linearly_to_its_maximum_over_the_warmup():
    rates = [learning_rate(step, num_steps=100, max_lr=2.0, warmup_steps=4) for step in range(6)]
    assert rates == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0, 2.0])


def test_the_rate_steps_down_after_60_and_after_90_percent_of_the_steps():
    rates = [learning_rate(step, num_steps=10, max_lr=1.0, warmup_steps=0) for step in range(10)]
    assert rates == pytest.approx([1.0] * 6 + [0.316] * 3 + [0.316**2])


@pytest.mark.parametrize("step", [-1, 10])
def test_a_step_outside_the_phase_is_refused_with_the_range(step):
    with pytest.raises(ValueError, match=rf"step must be in \[0, 10\), got {step}"):
        learning_rate(step, num_steps=10, max_lr=1.0, warmup_steps=0)
