"""Several answers to one request: the streams of its choices as one, in the order in which they come.

A request has `n` choices for each of its prompts; choice `index` belongs to prompt `index // n`. A request with a
single choice needs none of this: its Generation is the stream.
"""

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import replace
from typing import Self

from deploy.gateway.generation import Generation, GenerationEvent, Usage


def choice_seed(seed: int, choice: int) -> int:
    """The seed of one of a prompt's `n` choices. The first has the client's own, so that it is the answer of n = 1."""
    if choice == 0:
        return seed
    return int.from_bytes(hashlib.blake2b(f"{seed}/{choice}".encode(), digest_size=8).digest(), "little")


class Choices:
    """An accepted request with more than one choice. Iterating runs all of them; whoever got it closes it.

    Each choice ends with an event that has its finish reason; the last event of all has the usage of the request, its
    prompts counted once each. The first choice that fails ends the others, and its error is the request's. A slow
    reader holds every choice back: at most one event of each waits.
    """

    def __init__(self, request_id: str, prompt_tokens: Sequence[int], generations: Sequence[Generation]) -> None:
        """`prompt_tokens` of each prompt. Takes over the generations, those of a prompt one after another."""
        self.id = request_id
        self.created = generations[0].created
        self.log_id = generations[0].log_id
        self._prompt_tokens = prompt_tokens
        self._generations = generations
        self._events = self._run()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> GenerationEvent:
        """Raises what the first failing choice raises."""
        return await anext(self._events)

    async def aclose(self) -> None:
        """Ends all choices that still run."""
        try:
            await self._events.aclose()
        finally:
            await self._close_all()

    async def _run(self) -> AsyncGenerator[GenerationEvent, None]:
        coming = {asyncio.ensure_future(_next(choice)): index for index, choice in enumerate(self._generations)}
        ended: dict[int, Usage] = {}  # by choice
        try:
            while coming:
                done, _ = await asyncio.wait(coming, return_when=asyncio.FIRST_COMPLETED)
                for task in sorted(done, key=lambda task: coming[task]):
                    index = coming.pop(task)
                    event = task.result()
                    if event.usage is None:
                        coming[asyncio.ensure_future(_next(self._generations[index]))] = index
                    else:
                        ended[index] = event.usage
                    yield replace(event, index=index, usage=None if coming else self._usage(ended))
        except Exception:
            for choice in self._generations:
                choice.left_as = "another choice failed"
            raise
        finally:
            for task in coming:
                task.cancel()
            await asyncio.gather(*coming, return_exceptions=True)
            await self._close_all()

    def _usage(self, choices: Mapping[int, Usage]) -> Usage:
        """Of the request. What a prompt's choices did not all find in the cache was computed for it."""
        found = [choices[index].cached_tokens for index in range(len(self._generations))]
        n = len(found) // len(self._prompt_tokens)
        return Usage(
            prompt_tokens=sum(self._prompt_tokens),
            completion_tokens=sum(usage.completion_tokens for usage in choices.values()),
            cached_tokens=sum(min(found[start : start + n]) for start in range(0, len(found), n)),
        )

    async def _close_all(self) -> None:
        await asyncio.gather(*(choice.aclose() for choice in self._generations))


async def _next(choice: Generation) -> GenerationEvent:
    return await anext(choice)


Accepted = Generation | Choices
