"""The one table from exception to gRPC status, HTTP status and OpenAI error type."""

import logging
from dataclasses import dataclass

import grpc

from deploy.gateway.validation import BodyTooLargeError
from model_shards.errors import (
    CapacityError,
    CheckpointError,
    ConfigError,
    DeadlineError,
    EpochAbortedError,
    FailedRequestError,
    InvalidRequestError,
    OverloadedError,
    ShoalError,
    UnauthenticatedError,
    UnavailableError,
    UnknownModelError,
)

logger = logging.getLogger(__name__)

# A message echoes what the client sent; gRPC carries it percent-encoded in a header, and headers end at 8 KiB.
_MAX_MESSAGE = 500


@dataclass(frozen=True)
class Status:
    """How an error reaches a client, on either wire."""

    code: grpc.StatusCode
    http: int
    type: str  # OpenAI's error.type
    message: str
    retry_after_s: float | None = None
    label: str | None = None  # OpenAI's error.code, where it is not the gRPC code's name


@dataclass(frozen=True)
class _Row:
    code: grpc.StatusCode
    http: int
    type: str
    label: str | None = None


# Compared by identity: another row of the same status tells its message.
_INTERNAL = _Row(grpc.StatusCode.INTERNAL, 500, "internal_error")

# The first class that fits counts. Rows of `_INTERNAL` are the operator's business: clients get no message of theirs.
TABLE: dict[type[ShoalError], _Row] = {
    BodyTooLargeError: _Row(grpc.StatusCode.INVALID_ARGUMENT, 413, "invalid_request_error"),
    InvalidRequestError: _Row(grpc.StatusCode.INVALID_ARGUMENT, 400, "invalid_request_error"),
    UnknownModelError: _Row(grpc.StatusCode.NOT_FOUND, 404, "invalid_request_error", "model_not_found"),
    UnauthenticatedError: _Row(grpc.StatusCode.UNAUTHENTICATED, 401, "authentication_error"),
    OverloadedError: _Row(grpc.StatusCode.RESOURCE_EXHAUSTED, 429, "rate_limit_error"),
    UnavailableError: _Row(grpc.StatusCode.UNAVAILABLE, 503, "service_unavailable"),
    EpochAbortedError: _Row(grpc.StatusCode.UNAVAILABLE, 503, "service_unavailable"),
    # Told with its message, which has no internals; not UNAVAILABLE, which clients answer by sending it again.
    FailedRequestError: _Row(grpc.StatusCode.INTERNAL, 500, "internal_error"),
    DeadlineError: _Row(grpc.StatusCode.DEADLINE_EXCEEDED, 504, "timeout"),
    ConfigError: _INTERNAL,
    CheckpointError: _INTERNAL,
    CapacityError: _INTERNAL,
}


def status_of(error: BaseException, request_id: str) -> Status:
    """What a client is told. An internal error is logged with its traceback, and told without its internals."""
    row = next((row for kind, row in TABLE.items() if isinstance(error, kind)), _INTERNAL)
    if row is _INTERNAL:
        fields = {"request_id": request_id, "error": f"{type(error).__name__}: {error}"}
        logger.error("internal error", exc_info=error, extra={"fields": fields})
        return Status(row.code, row.http, row.type, f"internal error; the server's log has it as request {request_id}")
    # Ray wraps what crosses a process: the cause then has the message without the remote traceback.
    cause = getattr(error, "cause", None)
    told = cause if isinstance(cause, ShoalError) else error
    retry_after_s = told.retry_after_s if isinstance(told, OverloadedError) else None
    message = str(told) or row.type
    if len(message) > _MAX_MESSAGE:
        message = f"{message[: _MAX_MESSAGE - 3]}..."
    return Status(row.code, row.http, row.type, message, retry_after_s, row.label)
