"""Reads a request's body."""

import reprlib
from typing import TypeVar

from fastapi import Request
from pydantic import ValidationError

from deploy.gateway.http.wire import ChatBody, CompletionBody
from deploy.gateway.validation import BodyTooLargeError
from model_shards.errors import InvalidRequestError

MAX_BODY_BYTES = 16 * 2**20

Body = TypeVar("Body", CompletionBody, ChatBody)


async def read_body(request: Request, kind: type[Body]) -> Body:
    """The body as `kind`.

    Raises BodyTooLargeError, and InvalidRequestError for what is not UTF-8, not JSON, or has a field of a wrong type.
    """
    data = await _read(request)
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequestError(
            f"the body must be UTF-8, got byte {data[error.start]:#04x} at {error.start}"
        ) from None
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
    if first["type"] == "json_invalid":
        raise InvalidRequestError(f"the body must be JSON: {first['msg'].removeprefix('Invalid JSON: ')}")
    field = ".".join(str(key) for key in first["loc"]) or "the body"
    raise InvalidRequestError(f"{field}: {first['msg']}, got {reprlib.repr(first['input'])}")


async def _read(request: Request) -> bytes:
    said = request.headers.get("content-length", "")
    if said.isdecimal() and int(said) > MAX_BODY_BYTES:
        raise BodyTooLargeError(f"the body must be at most {MAX_BODY_BYTES} bytes, got {said}")
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > MAX_BODY_BYTES:
            raise BodyTooLargeError(f"the body must be at most {MAX_BODY_BYTES} bytes, got more")
    return bytes(data)
