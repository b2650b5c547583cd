"""Outputs that wait for a slow reader are joined, a bounded number at a time. No torch."""

import asyncio
from collections.abc import Callable, Sequence
from typing import TypeAlias

from cluster.request import StepOutput
from model_shards.errors import ShoalError

OutputQueue: TypeAlias = "asyncio.Queue[StepOutput | Exception]"
OnOutput = Callable[[StepOutput | ShoalError], None]

# Of one request, read at once: what is made of them (text, a message to the client) must not hold up other streams.
MAX_JOINED = 256


def join_outputs(outputs: Sequence[StepOutput]) -> StepOutput:
    """Outputs of one request, in order and at least one, as one."""
    if len(outputs) == 1:
        return outputs[0]
    last = outputs[-1]
    return StepOutput(
        last.request_id,
        tuple(token_id for output in outputs for token_id in output.token_ids),
        last.finish_reason,
        tuple(logprob for output in outputs for logprob in output.logprobs),
        last.error,
        last.num_cached_tokens,
    )


async def next_output(stream: OutputQueue) -> StepOutput:
    """Waits for an output and joins to it those that wait behind it, up to an end and `MAX_JOINED` in all.

    Raises an error that is among them.
    """
    merged = merge_outputs(await stream.get(), stream)
    if isinstance(merged, Exception):
        raise merged
    return merged


def merge_outputs(first: StepOutput | Exception, stream: OutputQueue) -> StepOutput | Exception:
    """Joins outputs that already wait in `stream` to the first, as `next_output` says; an error among them wins."""
    if isinstance(first, Exception):
        return first
    joined = [first]
    while joined[-1].finish_reason is None and len(joined) < MAX_JOINED and not stream.empty():
        following = stream.get_nowait()
        if isinstance(following, Exception):
            return following
        joined.append(following)
    return join_outputs(joined)
