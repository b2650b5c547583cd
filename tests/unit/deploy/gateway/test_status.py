"""The table from exception to status."""

import logging

import grpc
import pytest
from ray.exceptions import RayTaskError

from deploy.gateway.status import TABLE, status_of
from deploy.gateway.validation import BodyTooLargeError
from model_shards import errors

EXPECTED = {
    errors.InvalidRequestError: (grpc.StatusCode.INVALID_ARGUMENT, 400),
    errors.UnknownModelError: (grpc.StatusCode.NOT_FOUND, 404),
    errors.UnauthenticatedError: (grpc.StatusCode.UNAUTHENTICATED, 401),
    errors.OverloadedError: (grpc.StatusCode.RESOURCE_EXHAUSTED, 429),
    errors.UnavailableError: (grpc.StatusCode.UNAVAILABLE, 503),
    errors.FailedRequestError: (grpc.StatusCode.INTERNAL, 500),
    errors.EpochAbortedError: (grpc.StatusCode.UNAVAILABLE, 503),
    errors.DeadlineError: (grpc.StatusCode.DEADLINE_EXCEEDED, 504),
    errors.ConfigError: (grpc.StatusCode.INTERNAL, 500),
    errors.CheckpointError: (grpc.StatusCode.INTERNAL, 500),
    errors.CapacityError: (grpc.StatusCode.INTERNAL, 500),
    BodyTooLargeError: (grpc.StatusCode.INVALID_ARGUMENT, 413),
}


def test_every_class_of_the_error_tree_has_a_row():
    assert {kind for kind in vars(errors).values() if isinstance(kind, type)} - {errors.ShoalError} <= set(TABLE)


@pytest.mark.parametrize("kind", EXPECTED)
def test_an_error_has_its_status_on_both_wires(kind):
    status = status_of(kind("what is wrong"), "r1")
    assert (status.code, status.http) == EXPECTED[kind]
    is_told = status.http != 500 or kind is errors.FailedRequestError
    assert (status.message == "what is wrong") == is_told


@pytest.mark.parametrize("error", [ValueError("secret path"), TimeoutError("secret path"), KeyError()])
def test_an_unknown_error_is_internal_logged_and_told_without_its_internals(error, caplog):
    with caplog.at_level(logging.ERROR, "deploy.gateway.status"):
        status = status_of(error, "r1")
    assert (status.code, status.http) == (grpc.StatusCode.INTERNAL, 500)
    assert status.message == "internal error; the server's log has it as request r1"
    (record,) = caplog.records
    assert record.fields["request_id"] == "r1"
    assert record.fields["error"] == f"{type(error).__name__}: {error}"
    assert record.exc_info[1] is error


def test_overload_carries_its_retry_delay():
    assert status_of(errors.OverloadedError("full", 2.5), "r1").retry_after_s == 2.5
    assert status_of(errors.UnavailableError("away"), "r1").retry_after_s is None


@pytest.mark.parametrize("cause", [errors.InvalidRequestError("too long"), errors.OverloadedError("full", 3.0)])
def test_an_error_that_crossed_ray_is_told_as_its_cause_without_the_remote_traceback(cause):
    crossed = RayTaskError("generate", "Traceback: secret", cause).as_instanceof_cause()
    assert crossed is not cause
    assert status_of(crossed, "r1") == status_of(cause, "r1")


def test_a_message_that_echoes_a_long_value_is_cut():
    status = status_of(errors.UnknownModelError("é" * 100_000), "r1")
    assert len(status.message) == 500
    assert status.message.endswith("é...")
