"""The arithmetic of `shoal bench`: from what each request saw to one report. Pure: no clock, no network."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class BenchPlan:
    """What was asked for."""

    address: str
    model: str
    concurrency: int
    num_prompts: int
    input_len: int  # tokens
    output_len: int  # tokens
    seed: int


@dataclass(frozen=True)
class RequestSample:
    """What one request saw; times in seconds. `failure` names why it does not count, None when it does."""

    ttft_s: float | None = None
    time_per_output_token_s: float | None = None
    latency_s: float | None = None
    num_output_tokens: int = 0
    failure: str | None = None
    detail: str = ""


@dataclass(frozen=True)
class Distribution:
    """Mean and percentiles of one measure, in seconds."""

    mean: float
    p50: float
    p90: float
    p99: float


@dataclass(frozen=True)
class BenchReport:
    """The result; a distribution is None when no request gave a value."""

    plan: BenchPlan
    duration_s: float
    completed: int
    failed: int
    failures: dict[str, int]  # by name
    output_tokens: int
    output_tokens_per_s: float
    requests_per_s: float
    ttft_s: Distribution | None
    time_per_output_token_s: Distribution | None
    latency_s: Distribution | None


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear interpolation between the closest ranks, as numpy's default; `values` must not be empty."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def distribution(values: Sequence[float | None]) -> Distribution | None:
    """Of the values that are there; None when none is."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return Distribution(
        mean=sum(known) / len(known),
        p50=percentile(known, 50),
        p90=percentile(known, 90),
        p99=percentile(known, 99),
    )


def summarize(plan: BenchPlan, samples: Sequence[RequestSample], duration_s: float) -> BenchReport:
    """Rates count the tokens and requests that succeeded, over the time of the whole run."""
    done = [sample for sample in samples if sample.failure is None]
    failures = Counter(sample.failure for sample in samples if sample.failure is not None)
    output_tokens = sum(sample.num_output_tokens for sample in done)
    return BenchReport(
        plan=plan,
        duration_s=duration_s,
        completed=len(done),
        failed=failures.total(),
        failures=dict(sorted(failures.items())),
        output_tokens=output_tokens,
        output_tokens_per_s=output_tokens / duration_s if duration_s > 0 else 0.0,
        requests_per_s=len(done) / duration_s if duration_s > 0 else 0.0,
        ttft_s=distribution([sample.ttft_s for sample in done]),
        time_per_output_token_s=distribution([sample.time_per_output_token_s for sample in done]),
        latency_s=distribution([sample.latency_s for sample in done]),
    )


def describe(report: BenchReport) -> str:
    """A table for people."""
    plan = report.plan
    lines = [
        f"model {plan.model} at {plan.address}: {plan.num_prompts} prompts of {plan.input_len} tokens, "
        f"{plan.output_len} tokens each, {plan.concurrency} at once",
        "",
        f"{'completed':<26}{report.completed} in {report.duration_s:.2f} s",
        f"{'failed':<26}{report.failed}",
        *(f"  {name:<24}{count}" for name, count in report.failures.items()),
        f"{'output tokens/s':<26}{report.output_tokens_per_s:.1f}",
        f"{'requests/s':<26}{report.requests_per_s:.2f}",
        "",
        f"{'ms':<26}{'mean':>10}{'p50':>10}{'p90':>10}{'p99':>10}",
        _row("time to first token", report.ttft_s),
        _row("time per output token", report.time_per_output_token_s),
        _row("whole request", report.latency_s),
    ]
    return "\n".join(lines)


def _row(name: str, values: Distribution | None) -> str:
    if values is None:
        return f"{name:<26}{'-':>10}{'-':>10}{'-':>10}{'-':>10}"
    cells = (values.mean, values.p50, values.p90, values.p99)
    return f"{name:<26}" + "".join(f"{value * 1000:>10.2f}" for value in cells)
