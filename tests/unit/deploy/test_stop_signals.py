"""Signals of `shoal serve` from its first line on: the start ends in order, whatever the signal falls upon."""

import signal

import pytest
from click.testing import CliRunner

from deploy.cli.main import shoal
from deploy.launch.signals import StartInterrupted, StopSignals
from model_shards.errors import CheckpointError

NUMBERS = [signal.SIGTERM, signal.SIGINT]


def serve_with(monkeypatch, where, step):
    """`shoal serve` with `step` in place of one part of its start, and nothing behind it."""
    monkeypatch.setattr(where, step)
    return CliRunner().invoke(shoal, ["serve", "--grpc-port", "0", "--http-port", "0"])


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("where", ["deploy.config.ShoalConfig.load", "deploy.preflight.preflight"])
def test_a_signal_before_ray_is_there_ends_the_start_with_status_0(monkeypatch, where, number):
    handlers = [signal.getsignal(each) for each in NUMBERS]
    result = serve_with(monkeypatch, where, lambda *_: signal.raise_signal(number))
    assert result.exit_code == 0
    assert result.stdout == ""
    assert result.stderr.splitlines()[-1] == "shoal: stopped before it was ready"
    assert [signal.getsignal(each) for each in NUMBERS] == handlers


def swallow(settings):
    try:
        signal.raise_signal(signal.SIGINT)
    except BaseException:
        return settings


def turn_into_another(settings):
    try:
        signal.raise_signal(signal.SIGINT)
    except BaseException:
        raise CheckpointError("cut short") from None


@pytest.mark.parametrize("step", [swallow, turn_into_another])
def test_a_signal_is_not_lost_in_code_that_catches_everything(monkeypatch, step):
    def never(*_):
        pytest.fail("the start was carried on")

    monkeypatch.setattr("deploy.launch.service.run_service", never)
    assert serve_with(monkeypatch, "deploy.preflight.preflight", step).exit_code == 0


def test_a_signal_between_two_parts_of_the_start_stops_the_next_one():
    signals, reached = StopSignals(), []
    with signals.installed():
        with signals.interrupting():
            reached.append("first")
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(StartInterrupted), signals.interrupting():
            reached.append("second")
    assert reached == ["first"]


def test_once_started_a_signal_is_waited_for_and_interrupts_nothing():
    signals = StopSignals()
    with signals.installed():
        with signals.interrupting():
            assert not signals.wait(0.0)
        signal.raise_signal(signal.SIGTERM)
        assert signals.wait(0.0)


def test_an_error_of_a_start_that_nobody_stopped_stays_what_it_is():
    signals = StopSignals()
    with signals.installed(), pytest.raises(CheckpointError), signals.interrupting():
        raise CheckpointError("cut short")
