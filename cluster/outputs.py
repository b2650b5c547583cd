"""Outputs that wait for a slow reader become one: waiting costs memory for the tokens alone. No torch."""

import asyncio
from typing import TypeAlias

from cluster.request import StepOutput

OutputQueue: TypeAlias = "asyncio.Queue[StepOutput | Exception]"


def join_outputs(first: StepOutput, following: StepOutput) -> StepOutput:
    """Two outputs of one request, in order, as one."""
    return StepOutput(
        first.request_id,
        first.token_ids + following.token_ids,
        following.finish_reason,
        first.logprobs + following.logprobs,
        following.error,
    )


async def next_output(stream: OutputQueue) -> StepOutput:
    """Waits for an output and joins to it those that wait behind it, up to an end.

    Raises an error that is among them.
    """
    merged = merge_outputs(await stream.get(), stream)
    if isinstance(merged, Exception):
        raise merged
    return merged


def merge_outputs(first: StepOutput | Exception, stream: OutputQueue) -> StepOutput | Exception:
    """Joins the outputs that already wait in `stream` to the first, up to an end; an error among them wins."""
    if isinstance(first, Exception):
        return first
    merged = first
    while merged.finish_reason is None and not stream.empty():
        following = stream.get_nowait()
        if isinstance(following, Exception):
            return following
        merged = join_outputs(merged, following)
    return merged
