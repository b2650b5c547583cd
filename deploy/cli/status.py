"""`shoal status`."""

import click

from deploy.cli.text import address_option


@click.command()
@address_option
@click.pass_context
def status(ctx: click.Context, address: str) -> None:
    """Show whether a service answers, and what it serves. Exits 0 when it takes requests, 1 otherwise.

    \b
    shoal status
    shoal status --address 10.0.0.7:9000
    """
    import time

    from deploy.client import ShoalClient

    with ShoalClient(address) as client:
        begun = time.perf_counter()
        health = client.health()
        took_ms = (time.perf_counter() - begun) * 1000
        models = client.models()
    click.echo(f"address  {address}")
    click.echo(f"health   {health} (answered in {took_ms:.1f} ms)")
    for model in models:
        click.echo(f"model    {model.id}: context {model.max_model_len} tokens, vocabulary {model.vocab_size}")
    if not models:
        click.echo("model    none is served")
    if health != "SERVING" or not models:
        ctx.exit(1)
