"""`shoal bench`."""

import click

from deploy.cli.text import address_option, is_text


@click.command()
@address_option
@click.option("--model", callback=is_text, default="", help="Which model.  [default: the served one]")
@click.option("--concurrency", type=click.IntRange(1), default=8, show_default=True, help="Requests at once.")
@click.option("--num-prompts", type=click.IntRange(1), default=32, show_default=True, help="Requests in all.")
@click.option("--input-len", type=click.IntRange(1), default=128, show_default=True, help="Tokens of each prompt.")
@click.option("--output-len", type=click.IntRange(1), default=64, show_default=True, help="Tokens of each answer.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the random prompts.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object; times in seconds.")
@click.pass_context
def bench(
    ctx: click.Context,
    address: str,
    model: str,
    concurrency: int,
    num_prompts: int,
    input_len: int,
    output_len: int,
    seed: int,
    as_json: bool,
) -> None:
    """Measure a running service with random prompts, greedily decoded to full length.

    Prints time to first token, time per output token (after the first) and tokens/s. One request that is not counted
    goes first. Exits 1 when a request failed; failures are counted by the name of their gRPC status.

    \b
    shoal bench --concurrency 1 --num-prompts 8
    shoal bench --address 10.0.0.7:9000 --concurrency 64 --num-prompts 512 --input-len 1024 --output-len 256 --json
    """
    import dataclasses
    import json

    from deploy.cli.bench_run import run_bench
    from deploy.cli.bench_stats import BenchPlan, describe

    plan = BenchPlan(address, model, concurrency, num_prompts, input_len, output_len, seed)
    report, examples = run_bench(plan)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(report)))
    else:
        click.echo(describe(report))
    for failure, detail in examples.items():
        click.echo(f"shoal: error: {report.failures[failure]} x {failure}: {detail}", err=True)
    if report.failed:
        ctx.exit(1)
