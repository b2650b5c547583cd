"""Routes."""

from collections.abc import Callable

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from deploy.gateway.choices import Accepted
from deploy.gateway.http.answers import ChatAnswer, CompletionAnswer, model_object
from deploy.gateway.http.body import read_body
from deploy.gateway.http.errors import RequestErrors, routing_error
from deploy.gateway.http.respond import Answer, AnswerResponse, StreamResponse
from deploy.gateway.http.wire import ChatBody, CompletionBody
from deploy.gateway.service import Gateway
from deploy.gateway.validation import check_model


def create_http_app(get_gateway: Callable[[], Gateway]) -> FastAPI:
    """The app of one gateway replica; `get_gateway` is asked on each request."""
    app = FastAPI(title="Shoal", openapi_url=None)
    app.add_middleware(RequestErrors)
    app.add_exception_handler(HTTPException, routing_error)

    @app.get("/healthz")
    async def healthz() -> Response:
        serving = get_gateway().serving
        return JSONResponse({"status": "ok" if serving else "draining"}, 200 if serving else 503)

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [model_object(get_gateway())]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        check_model(name, get_gateway().model)
        return JSONResponse(model_object(get_gateway()))

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        body = await read_body(request, CompletionBody)
        gateway = get_gateway()
        accepted = await gateway.complete_all(body.model, body.prompts(), body.fields(), request.state.request_id)
        return _respond(body, accepted, CompletionAnswer(accepted, gateway, body.logprobs is not None))

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        body = await read_body(request, ChatBody)
        gateway = get_gateway()
        messages = [message.message() for message in body.messages]
        accepted = await gateway.chat(body.model, messages, body.fields(), request.state.request_id)
        return _respond(body, accepted, ChatAnswer(accepted, gateway, body.logprobs))

    return app


def _respond(body: CompletionBody | ChatBody, accepted: Accepted, answer: Answer) -> Response:
    if not body.stream:
        return AnswerResponse(accepted, answer)
    include_usage = body.stream_options is not None and body.stream_options.include_usage
    return StreamResponse(accepted, answer, include_usage)
