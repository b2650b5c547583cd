"""Routes, errors in OpenAI's shape, and server-sent events."""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import ValidationError

from deploy.gateway.http.answers import ChatAnswer, CompletionAnswer, Json
from deploy.gateway.http.wire import ChatBody, CompletionBody
from deploy.gateway.service import Gateway, Generation, GenerationEvent
from deploy.gateway.status import Status, status_of
from model_shards.errors import InvalidRequestError, ShoalError

MAX_BODY_BYTES = 16 * 2**20
Answer = ChatAnswer | CompletionAnswer
Body = TypeVar("Body", CompletionBody, ChatBody)


def create_http_app(get_gateway: Callable[[], Gateway]) -> FastAPI:
    """The app of one gateway replica; `get_gateway` is asked on each request."""
    app = FastAPI(title="Shoal", docs_url=None, redoc_url=None)

    @app.middleware("http")
    async def name_request(request: Request, call: Callable[[Request], Awaitable[Response]]) -> Response:
        request.state.id = request.headers.get("x-request-id", uuid.uuid4().hex)[:128]
        try:
            response = await call(request)
        except Exception as error:
            response = error_response(status_of(error, request.state.id))
        response.headers["x-request-id"] = request.state.id
        return response

    @app.exception_handler(ShoalError)
    async def shoal_error(request: Request, error: ShoalError) -> Response:
        return error_response(status_of(error, request.state.id))

    @app.get("/healthz")
    async def healthz() -> Response:
        serving = get_gateway().serving
        return JSONResponse({"status": "ok" if serving else "draining"}, 200 if serving else 503)

    @app.get("/v1/models")
    async def models() -> Json:
        model = get_gateway().model
        entry = {"id": model.name, "object": "model", "created": 0, "owned_by": "shoal"}
        return {"object": "list", "data": [entry | {"max_model_len": model.max_model_len}]}

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        body = await read_body(request, CompletionBody)
        gateway = get_gateway()
        generation = gateway.complete(body.model, body.one_prompt(), body.fields())
        include_usage = body.stream_options is not None and body.stream_options.include_usage
        answer = CompletionAnswer(generation, gateway.tokenizer, body.logprobs is not None)
        return await respond(request, generation, answer, body.stream, include_usage)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        body = await read_body(request, ChatBody)
        gateway = get_gateway()
        generation = gateway.chat(body.model, [message.message() for message in body.messages], body.fields())
        include_usage = body.stream_options is not None and body.stream_options.include_usage
        answer = ChatAnswer(generation, gateway.tokenizer, body.logprobs)
        return await respond(request, generation, answer, body.stream, include_usage)

    return app


async def read_body(request: Request, kind: type[Body]) -> Body:
    """The body as `kind`. Raises InvalidRequestError for what is too large, no UTF-8, no JSON, or of a wrong type."""
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > MAX_BODY_BYTES:
            raise InvalidRequestError(f"the body must be at most {MAX_BODY_BYTES} bytes, got more")
    try:
        parsed = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InvalidRequestError(
            f"the body must be UTF-8, got byte {data[error.start]:#04x} at {error.start}"
        ) from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise InvalidRequestError(f"the body must be JSON: {error}") from None
    try:
        return kind.model_validate(parsed)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(key) for key in first["loc"]) or "the body"
        raise InvalidRequestError(f"{where}: {first['msg']}, got {str(first['input'])[:200]!r}") from None


async def respond(
    request: Request, generation: Generation, answer: Answer, stream: bool, include_usage: bool
) -> Response:
    """The answer as one object or as server-sent events; a client that leaves ends the generation."""
    if stream:
        events = sse(generation, answer, include_usage, request.state.id)
        return StreamingResponse(events, media_type="text/event-stream", headers={"cache-control": "no-cache"})
    collected = asyncio.ensure_future(collect(generation))
    left = asyncio.ensure_future(client_left(request))
    try:
        await asyncio.wait((collected, left), return_when=asyncio.FIRST_COMPLETED)
        if not collected.done():
            # Nobody reads this answer; what matters is that the generation ends below.
            return Response(status_code=499)
        return JSONResponse(answer.whole(await collected))
    finally:
        left.cancel()
        collected.cancel()
        await asyncio.gather(collected, left, return_exceptions=True)


async def collect(generation: Generation) -> list[GenerationEvent]:
    """All events of a generation."""
    async with aclosing(generation.events) as events:
        return [event async for event in events]


async def client_left(request: Request) -> None:
    """Returns when the client closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        continue


async def sse(generation: Generation, answer: Answer, include_usage: bool, request_id: str) -> AsyncIterator[str]:
    """Server-sent events, `[DONE]` last; an error after the start is an event, as the status is sent already."""
    try:
        first = answer.first()
        if first is not None:
            yield data_line(first)
        async with aclosing(generation.events) as events:
            async for event in events:
                yield data_line(answer.chunk(event))
                if event.finish_reason is not None and include_usage:
                    yield data_line(answer.usage(event))
    except Exception as error:
        yield data_line(error_object(status_of(error, request_id)))
    yield "data: [DONE]\n\n"


def data_line(value: Json) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


def error_object(status: Status) -> Json:
    """OpenAI's error body."""
    return {"error": {"message": status.message, "type": status.type, "param": None, "code": status.code.name.lower()}}


def error_response(status: Status) -> Response:
    """OpenAI's error body with its HTTP status."""
    headers = {}
    if status.retry_after_s is not None:
        headers["retry-after"] = str(max(1, round(status.retry_after_s)))
    return JSONResponse(error_object(status), status.http, headers=headers)
