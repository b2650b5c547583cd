"""The one table from exception to gRPC status, HTTP status and OpenAI error type."""

import logging
from dataclasses import dataclass

import grpc

from cluster.logs import log_event
from model_shards.errors import (
    DeadlineError,
    InvalidRequestError,
    OverloadedError,
    ShoalError,
    UnauthenticatedError,
    UnavailableError,
    UnknownModelError,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Status:
    """How an error reaches a client, on either wire."""

    code: grpc.StatusCode
    http: int
    type: str  # OpenAI's error.type
    message: str
    retry_after_s: float | None = None


_TABLE: tuple[tuple[type[BaseException], grpc.StatusCode, int, str], ...] = (
    (InvalidRequestError, grpc.StatusCode.INVALID_ARGUMENT, 400, "invalid_request_error"),
    (UnknownModelError, grpc.StatusCode.NOT_FOUND, 404, "invalid_request_error"),
    (UnauthenticatedError, grpc.StatusCode.UNAUTHENTICATED, 401, "authentication_error"),
    (OverloadedError, grpc.StatusCode.RESOURCE_EXHAUSTED, 429, "rate_limit_error"),
    (UnavailableError, grpc.StatusCode.UNAVAILABLE, 503, "service_unavailable"),
    (DeadlineError, grpc.StatusCode.DEADLINE_EXCEEDED, 504, "timeout"),
    (TimeoutError, grpc.StatusCode.DEADLINE_EXCEEDED, 504, "timeout"),
)


def status_of(error: BaseException, request_id: str) -> Status:
    """What a client is told. An error that is not in the table is logged and told without its internals."""
    for kind, code, http, name in _TABLE:
        if isinstance(error, kind):
            retry = error.retry_after_s if isinstance(error, OverloadedError) else None
            # Ray wraps what crosses a process: the cause then has the message without the remote traceback.
            cause = getattr(error, "cause", None)
            told = cause if isinstance(cause, ShoalError) else error
            return Status(code, http, name, str(told) or name, retry)
    log_event(logger, "internal error", logging.ERROR, request_id=request_id, error=f"{type(error).__name__}: {error}")
    return Status(
        grpc.StatusCode.INTERNAL,
        500,
        "internal_error",
        f"internal error; the server's log has it as request {request_id}",
    )
