"""Runs the requests of `shoal bench`: one thread a request, `concurrency` of them at once."""

import random
import time
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import closing
from dataclasses import replace

from rich.console import Console
from rich.progress import Progress

from deploy.cli.bench_stats import BenchPlan, BenchReport, RequestSample, summarize
from deploy.cli.conversation import AnswerTimer
from deploy.client import CallError, Sampling, ServedModel, ShoalClient
from model_shards.errors import InvalidRequestError, UnknownModelError

SHORT_OUTPUT = "SHORT_OUTPUT"  # the stream ended well, with fewer tokens than asked for


def run_bench(plan: BenchPlan) -> tuple[BenchReport, dict[str, str]]:
    """The report, and one message for each kind of failure.

    Raises CallError when the service does not answer or the warm-up fails, UnknownModelError, and
    InvalidRequestError when the requests cannot fit the context.
    """
    with ShoalClient(plan.address) as client:
        served = choose_model(client.models(), plan.model)
        plan = replace(plan, model=served.id)
        if plan.input_len + plan.output_len > served.max_model_len:
            raise InvalidRequestError(
                f"--input-len {plan.input_len} and --output-len {plan.output_len} make "
                f"{plan.input_len + plan.output_len} tokens; the context of {served.id} holds {served.max_model_len}"
            )
        draw = random.Random(plan.seed)
        prompts = [[draw.randrange(served.vocab_size) for _ in range(plan.input_len)] for _ in range(plan.num_prompts)]
        warm_up = [draw.randrange(served.vocab_size) for _ in range(plan.input_len)]
        _generate(client, replace(plan, output_len=min(plan.output_len, 4)), warm_up)
        begun = time.perf_counter()
        samples = _run_all(client, plan, prompts)
        duration_s = time.perf_counter() - begun
    examples = {sample.failure: sample.detail for sample in samples if sample.failure is not None}
    return summarize(plan, samples, duration_s), examples


def choose_model(models: tuple[ServedModel, ...], name: str) -> ServedModel:
    """The named model, or the only one."""
    known = ", ".join(model.id for model in models) or "none"
    if name:
        for model in models:
            if model.id == name:
                return model
        raise UnknownModelError(f"model {name!r} is not served; served: {known}")
    if len(models) != 1:
        raise UnknownModelError(f"--model must name one of the served models: {known}")
    return models[0]


def _run_all(client: ShoalClient, plan: BenchPlan, prompts: list[list[int]]) -> list[RequestSample]:
    console = Console(stderr=True)
    with (
        ThreadPoolExecutor(plan.concurrency, thread_name_prefix="bench") as pool,
        Progress(console=console, transient=True, redirect_stdout=False, disable=not console.is_terminal) as progress,
    ):
        task = progress.add_task("requests", total=len(prompts))
        futures: list[Future[RequestSample]] = [pool.submit(_sample, client, plan, prompt) for prompt in prompts]
        try:
            for _ in as_completed(futures):
                progress.advance(task)
        except KeyboardInterrupt:
            # Leaving the pool waits for its threads: end what they wait for.
            pool.shutdown(wait=False, cancel_futures=True)
            client.close()
            raise
        return [future.result() for future in futures]


def _sample(client: ShoalClient, plan: BenchPlan, prompt: list[int]) -> RequestSample:
    try:
        timer = _generate(client, plan, prompt)
    except CallError as error:
        return RequestSample(failure=error.code, detail=error.detail)
    if timer.first is None or timer.num_tokens < plan.output_len:
        return RequestSample(failure=SHORT_OUTPUT, detail=f"{timer.num_tokens} of {plan.output_len} tokens came")
    return RequestSample(
        ttft_s=timer.first - timer.begun,
        time_per_output_token_s=timer.time_per_output_token_s,
        latency_s=time.perf_counter() - timer.begun,
        num_output_tokens=timer.num_tokens,
    )


def _generate(client: ShoalClient, plan: BenchPlan, prompt: list[int]) -> AnswerTimer:
    sampling = Sampling(max_tokens=plan.output_len, temperature=0.0, ignore_eos=True)
    timer = AnswerTimer(time.perf_counter())
    with closing(client.complete(prompt, sampling, plan.model)) as pieces:
        for piece in pieces:
            timer.saw(piece, time.perf_counter())
    return timer
