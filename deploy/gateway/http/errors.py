"""Errors in OpenAI's shape, each with its status and the id of its request."""

import uuid
from http import HTTPStatus

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deploy.gateway.http.answers import Json
from deploy.gateway.status import Status, status_of

_MAX_ID = 128


class RequestErrors:
    """ASGI middleware: names each request, and answers it with the status of what it raises."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The name is `x-request-id`: Serve's proxy makes one if the client sent none, and sends it back itself."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        named = Headers(scope=scope).get("x-request-id", "")[:_MAX_ID] or uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = named
        started = False

        async def send_noted(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, send_noted)
        except Exception as error:
            if started:
                raise
            await error_response(status_of(error, named))(scope, receive, send_noted)


def error_object(status: Status) -> dict[str, Json]:
    """OpenAI's error body."""
    return _error_object(status.message, status.type, status.label or status.code.name.lower())


def error_response(status: Status) -> Response:
    """OpenAI's error body with its HTTP status."""
    headers = {}
    if status.retry_after_s is not None:
        headers["retry-after"] = str(max(1, round(status.retry_after_s)))
    return JSONResponse(error_object(status), status.http, headers=headers)


async def routing_error(request: Request, error: Exception) -> Response:
    """What routing refuses: no such path, or not with this method."""
    assert isinstance(error, HTTPException)
    phrase = HTTPStatus(error.status_code).phrase
    message = f"{phrase}: {request.method} {request.url.path[:200]}"
    code = phrase.lower().replace(" ", "_")
    body = _error_object(message, "invalid_request_error", code)
    return JSONResponse(body, error.status_code, headers=dict(error.headers or {}))


def _error_object(message: str, kind: str, code: str) -> dict[str, Json]:
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}
