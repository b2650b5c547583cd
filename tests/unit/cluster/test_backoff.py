"""The pause between epochs that fail by themselves."""

from cluster.backoff import EpochBackoff


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_the_pause_doubles_with_each_failed_epoch_up_to_a_bound():
    backoff = EpochBackoff(Clock())
    pauses = []
    for epoch in range(1, 9):
        backoff.epoch_runs()
        backoff.epoch_failed(epoch)
        pauses.append(backoff.take())
    assert pauses == [0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0, 5.0]


def test_a_pause_is_taken_once():
    backoff = EpochBackoff(Clock())
    assert backoff.take() == 0.0
    backoff.epoch_failed(1)
    assert backoff.take() == 0.2
    assert backoff.take() == 0.0


def test_two_ranks_that_fail_in_one_epoch_count_once():
    backoff = EpochBackoff(Clock())
    backoff.epoch_failed(1)
    backoff.epoch_failed(1)
    assert backoff.take() == 0.2


def test_an_epoch_that_ran_for_a_while_makes_the_next_failure_the_first_again():
    clock = Clock()
    backoff = EpochBackoff(clock)
    for epoch, ran_s, pause_s in ((1, 1.0, 0.2), (2, 29.0, 0.4), (3, 30.0, 0.2)):
        backoff.epoch_runs()
        clock.now += ran_s
        backoff.epoch_failed(epoch)
        assert backoff.take() == pause_s
