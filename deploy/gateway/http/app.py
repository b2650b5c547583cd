"""Routes."""

from collections.abc import Callable

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from deploy.gateway.generation import Generation
from deploy.gateway.http.answers import ChatAnswer, CompletionAnswer
from deploy.gateway.http.body import read_body
from deploy.gateway.http.errors import RequestErrors, routing_error
from deploy.gateway.http.respond import Answer, AnswerResponse, StreamResponse
from deploy.gateway.http.wire import ChatBody, CompletionBody
from deploy.gateway.service import Gateway


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
        model = get_gateway().model
        entry = {"id": model.name, "object": "model", "created": 0, "owned_by": "shoal"}
        return JSONResponse({"object": "list", "data": [{**entry, "max_model_len": model.max_model_len}]})

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        body = await read_body(request, CompletionBody)
        gateway = get_gateway()
        generation = await gateway.complete(body.model, body.one_prompt(), body.fields())
        answer = CompletionAnswer(generation, gateway, body.logprobs is not None)
        return _respond(body, generation, answer)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        body = await read_body(request, ChatBody)
        gateway = get_gateway()
        messages = [message.message() for message in body.messages]
        generation = await gateway.chat(body.model, messages, body.fields())
        return _respond(body, generation, ChatAnswer(generation, gateway, body.logprobs))

    return app


def _respond(body: CompletionBody | ChatBody, generation: Generation, answer: Answer) -> Response:
    if not body.stream:
        return AnswerResponse(generation, answer)
    include_usage = body.stream_options is not None and body.stream_options.include_usage
    return StreamResponse(generation, answer, include_usage)
