"""`shoal chat`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from deploy.cli.text import address_option, check_text, is_text

if TYPE_CHECKING:
    from deploy.client import Sampling


@click.command()
@click.argument("prompt", callback=is_text, required=False)
@address_option
@click.option("--model", callback=is_text, default="", help="Which model.  [default: the served one]")
@click.option("--system", callback=is_text, help="A system message that goes before the conversation.")
@click.option("--max-tokens", type=click.IntRange(1), help="Longest answer.  [default: what is left of the context]")
@click.option("--temperature", type=float, help="0 is greedy.  [default: the server's, 1]")
@click.option("--seed", type=click.IntRange(0, 2**64 - 1), help="Makes a sampled answer repeatable.")
@click.pass_context
def chat(
    ctx: click.Context,
    prompt: str | None,
    address: str,
    model: str,
    system: str | None,
    max_tokens: int | None,
    temperature: float | None,
    seed: int | None,
) -> None:
    """Ask one question, or hold a conversation.

    The answer goes to stdout as it comes, timings to stderr. Without PROMPT: a conversation on a terminal (/new starts
    over, /exit or Ctrl-D leaves, Ctrl-C cancels the running answer); otherwise what is piped in is the prompt.

    \b
    shoal chat "What is a whale?"
    shoal chat --temperature 0 --max-tokens 100 --system "Answer in one sentence." "Why is the sea salt?"
    cat question.txt | shoal chat
    """
    from deploy.client import Sampling

    sampling = Sampling(max_tokens=max_tokens, temperature=temperature, seed=seed)
    if prompt is None and not sys.stdin.isatty():
        prompt = check_text("prompt", sys.stdin.buffer.read().decode(errors="surrogateescape"))
    ctx.exit(run_chat(prompt, address, model, system, sampling))


def run_chat(prompt: str | None, address: str, model: str, system: str | None, sampling: Sampling) -> int:
    """One answer, or a conversation when `prompt` is None; the exit status. Raises CallError for one answer."""
    from deploy.cli.conversation import Conversation
    from deploy.client import ShoalClient

    with ShoalClient(address) as client:
        conversation = Conversation(client, model, system, sampling)
        if prompt is None:
            conversation.hold()
            return 0
        return 0 if conversation.ask(prompt) else 130
