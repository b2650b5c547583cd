"""Sends an answer, whole or as server-sent events. A client that leaves ends its request."""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing

from fastapi.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from deploy.gateway.choices import Accepted
from deploy.gateway.generation import GenerationEvent
from deploy.gateway.http.answers import ChatAnswer, CompletionAnswer, Json, JsonObject
from deploy.gateway.http.errors import error_object
from deploy.gateway.status import status_of

Answer = ChatAnswer | CompletionAnswer
_EVENT_STREAM = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]


class _ConnectionGoneError(Exception):
    """Sending failed: nobody is left to be told anything."""


class AnswerResponse(Response):
    """Runs a request and sends its answer; closes the request however that ends.

    What goes wrong before the first event leaves as an exception, so that it gets an HTTP status of its own.
    """

    def __init__(self, accepted: Accepted, answer: Answer) -> None:
        super().__init__()
        self._accepted = accepted
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_or_stop(message: Message) -> None:
            try:
                await send(message)
            except OSError as error:  # how a server tells that the connection is gone
                raise _ConnectionGoneError from error

        async with aclosing(self._accepted):
            # An OSError of the engine is another matter: the client waits, and hears of it.
            with contextlib.suppress(_ConnectionGoneError):
                await unless_client_leaves(receive, self._respond(scope, receive, send_or_stop))

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        events = [event async for event in self._accepted]
        await JSONResponse(self._answer.whole(events))(scope, receive, send)


class StreamResponse(AnswerResponse):
    """The same as server-sent events."""

    def __init__(self, accepted: Accepted, answer: Answer, include_usage: bool) -> None:
        super().__init__(accepted, answer)
        self._include_usage = include_usage

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        first = await anext(self._accepted)
        await send({"type": "http.response.start", "status": 200, "headers": _EVENT_STREAM})
        async with aclosing(self._lines(first)) as lines:
            async for line in lines:
                await send({"type": "http.response.body", "body": line, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _lines(self, event: GenerationEvent) -> AsyncGenerator[bytes, None]:
        """`[DONE]` comes last; an error is an event too, as the status is sent already."""
        try:
            for chunk in self._answer.chunks(event):
                yield self._line(chunk)
            async for event in self._accepted:
                for chunk in self._answer.chunks(event):
                    yield self._line(chunk)
            if self._include_usage:
                yield _data(self._answer.usage(event))
        except Exception as error:
            yield _data(error_object(status_of(error, self._accepted.log_id)))
        yield b"data: [DONE]\n\n"

    def _line(self, chunk: JsonObject) -> bytes:
        """A client that asks for the usage finds the field in every chunk, with a value in the last one alone."""
        return _data({**chunk, "usage": None} if self._include_usage else chunk)


async def unless_client_leaves(receive: Receive, work: Coroutine[None, None, None]) -> None:
    """Runs `work` to its end, or cancels it when the client closes the connection; raises what it raises."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_client_left(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _client_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue


def _data(value: Json) -> bytes:
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()
