"""`shoal bench`: its arithmetic, and runs against a scripted service."""

import json

import grpc
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from deploy.cli.bench_stats import BenchPlan, RequestSample, describe, distribution, percentile, summarize
from deploy.cli.conversation import AnswerTimer
from deploy.cli.main import shoal
from deploy.client import Piece
from tests.scripted_service import Refusal, Script, scripted_service

PLAN = BenchPlan("127.0.0.1:9000", "tiny", concurrency=2, num_prompts=4, input_len=8, output_len=5, seed=0)
FLAGS = ["--num-prompts", "6", "--concurrency", "3", "--input-len", "10", "--output-len", "5"]


def bench(address, *arguments):
    return CliRunner().invoke(shoal, ["bench", "--address", address, *FLAGS, *arguments])


@given(values=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50), percent=st.floats(0, 100))
def test_a_percentile_is_numpys(values, percent):
    assert percentile(values, percent) == pytest.approx(float(np.percentile(values, percent)), rel=1e-9, abs=1e-6)


def test_a_distribution_leaves_out_what_was_not_measured():
    assert distribution([None, None]) is None
    spread = distribution([1.0, None, 3.0])
    assert (spread.mean, spread.p50) == (2.0, 2.0)
    assert spread.p99 == pytest.approx(2.98)


def test_rates_count_successes_over_the_whole_run():
    samples = [
        RequestSample(0.1, 0.01, 0.2, 5),
        RequestSample(0.3, 0.03, 0.4, 5),
        RequestSample(failure="UNAVAILABLE"),
        RequestSample(failure="INTERNAL"),
        RequestSample(failure="UNAVAILABLE"),
    ]
    report = summarize(PLAN, samples, duration_s=2.0)
    assert (report.completed, report.failed, report.output_tokens) == (2, 3, 10)
    assert report.failures == {"INTERNAL": 1, "UNAVAILABLE": 2}
    assert (report.output_tokens_per_s, report.requests_per_s) == (5.0, 1.0)
    assert report.ttft_s.mean == pytest.approx(0.2)
    assert report.time_per_output_token_s.p50 == pytest.approx(0.02)
    assert "UNAVAILABLE" in describe(report)


def test_a_run_without_one_success_still_has_a_report():
    report = summarize(PLAN, [RequestSample(failure="INTERNAL")], duration_s=0.0)
    assert report.ttft_s is None
    assert report.output_tokens_per_s == 0.0
    assert "-" in describe(report)


def test_time_per_output_token_leaves_out_the_first_piece():
    timer = AnswerTimer(begun=10.0)
    timer.saw(Piece("", 0), 10.4)
    timer.saw(Piece("ab", 2), 10.5)
    timer.saw(Piece("c", 1), 10.6)
    timer.saw(Piece("de", 2), 10.8)
    timer.saw(Piece("", 0, "stop"), 11.0)
    assert (timer.first, timer.last, timer.num_tokens) == (10.5, 10.8, 5)
    assert timer.time_per_output_token_s == pytest.approx(0.1)
    assert timer.summary("stop") == "5 tokens (stop), first after 0.50 s, then 10.0 tokens/s"


def test_one_piece_has_no_time_per_output_token():
    timer = AnswerTimer(begun=0.0)
    timer.saw(Piece("ab", 2), 1.0)
    assert timer.time_per_output_token_s is None
    assert "tokens/s" not in timer.summary("length")


def test_json_output_is_one_object_that_adds_up():
    script = Script(delay_s=0.005)
    with scripted_service(script) as address:
        result = bench(address, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["plan"]["model"] == "tiny"
    assert (report["completed"], report["failed"], report["output_tokens"]) == (6, 0, 30)
    assert report["output_tokens_per_s"] == pytest.approx(30 / report["duration_s"])
    assert report["ttft_s"]["p50"] >= 0.005
    assert report["time_per_output_token_s"]["p50"] >= 0.004
    assert report["latency_s"]["p50"] >= report["ttft_s"]["p50"]


def test_requests_are_as_asked_and_as_many_at_once():
    script = Script(delay_s=0.02)
    with scripted_service(script) as address:
        assert bench(address).exit_code == 0
    warm_up, *counted = script.requests
    assert warm_up.max_tokens == 4
    assert len(counted) == 6
    assert script.most_at_once == 3
    for request in counted:
        assert (request.max_tokens, request.ignore_eos, request.temperature) == (5, True, 0.0)
        assert len(request.token_ids.ids) == 10
        assert all(0 <= token_id < 100 for token_id in request.token_ids.ids)
    assert len({tuple(request.token_ids.ids) for request in script.requests}) == 7


def test_the_same_seed_sends_the_same_prompts():
    sent = []
    for seed in ("1", "1", "2"):
        script = Script()
        with scripted_service(script) as address:
            bench(address, "--concurrency", "1", "--seed", seed)
        sent.append([tuple(request.token_ids.ids) for request in script.requests])
    assert sent[0] == sent[1] != sent[2]


def test_failed_requests_are_counted_by_name_and_exit_1():
    overloaded = Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "this gateway is full")
    script = Script(refuse=lambda number: overloaded if number in (2, 4) else None)
    with scripted_service(script) as address:
        result = bench(address, "--json")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert (report["completed"], report["failures"]) == (4, {"RESOURCE_EXHAUSTED": 2})
    assert "2 x RESOURCE_EXHAUSTED: this gateway is full" in result.stderr


def test_an_answer_that_is_too_short_is_a_failure():
    with scripted_service(Script(short_by=1)) as address:
        result = bench(address, "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["failures"] == {"SHORT_OUTPUT": 6}
    assert "4 of 5 tokens came" in result.stderr


def test_requests_that_cannot_fit_the_context_are_not_sent():
    script = Script(max_model_len=14)
    with scripted_service(script) as address:
        result = bench(address)
    assert result.exit_code == 2
    assert "15 tokens; the context of tiny holds 14" in result.stderr
    assert script.requests == []


def test_a_model_that_is_not_served_is_refused_with_those_that_are():
    with scripted_service(Script(model_ids=("one", "two"))) as address:
        unknown, unnamed = bench(address, "--model", "three"), bench(address)
        assert bench(address, "--model", "two").exit_code == 0
    for result in (unknown, unnamed):
        assert result.exit_code == 2
        assert "one, two" in result.stderr
