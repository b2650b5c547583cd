"""How a ShoalError is told on the command line: one line that says what is wrong, one that says what to do next."""

from typing import IO

import click

from model_shards.errors import (
    CapacityError,
    CheckpointError,
    ConfigError,
    InvalidRequestError,
    OverloadedError,
    ShoalError,
    UnauthenticatedError,
    UnavailableError,
    UnknownModelError,
)

_USER_ERRORS = (
    CapacityError,
    CheckpointError,
    ConfigError,
    InvalidRequestError,
    UnauthenticatedError,
    UnknownModelError,
)
_NEXT: tuple[tuple[type[ShoalError], str], ...] = (
    (
        ConfigError,
        "change the setting; `shoal COMMAND --help` lists the options, `shoal check-config FILE` reads a file",
    ),
    (CheckpointError, "mend the checkpoint, or name another with --model"),
    (
        CapacityError,
        "free memory or disk, add devices, or ask for less: engine.kv_cache_memory_gb, other numbers of ranks",
    ),
    (UnavailableError, "the lines above may say why; run it again with `--set log.level=DEBUG` to see more"),
    (OverloadedError, "try again shortly"),
)
# gRPC status names of a CallError, by who should act.
_USER_CODES = ("INVALID_ARGUMENT", "NOT_FOUND", "UNAUTHENTICATED", "OUT_OF_RANGE", "FAILED_PRECONDITION")
_NEXT_BY_CODE = {
    "UNAVAILABLE": "start it with `shoal serve`, or name a running one with --address HOST:PORT",
    "UNIMPLEMENTED": "is it Shoal's gRPC port? `shoal serve` prints it as grpc=HOST:PORT",
    "NOT_FOUND": "`shoal status` lists the served models",
    "RESOURCE_EXHAUSTED": "try again shortly, or with less concurrency",
    "INTERNAL": "the server's log says more",
    "UNKNOWN": "the server's log says more",
}


class Failure(click.ClickException):
    """A ShoalError on its way out; make it with `failure_of`."""

    exit_code = 1

    def __init__(self, error: ShoalError) -> None:
        super().__init__(str(error))
        self._next = next_step(error)

    def show(self, file: IO[str] | None = None) -> None:
        """Writes `shoal: error: ...` and the next step to stderr."""
        for line in self.message.splitlines() or [""]:
            click.echo(f"shoal: error: {line}", file=file, err=True)
        if self._next:
            click.echo(f"shoal: next: {self._next}", file=file, err=True)


class UserFailure(Failure):
    """One that the user can mend: in the command, the configuration, the checkpoint or the machine."""

    exit_code = 2


def failure_of(error: ShoalError) -> Failure:
    """The failure with the exit status that tells who should act."""
    code = status_name(error)
    by_user = isinstance(error, _USER_ERRORS) if code is None else code in _USER_CODES
    return UserFailure(error) if by_user else Failure(error)


def next_step(error: ShoalError) -> str:
    """What to do about it; empty when the message says it all."""
    code = status_name(error)
    if code is not None:
        return _NEXT_BY_CODE.get(code, "")
    return next((text for kind, text in _NEXT if isinstance(error, kind)), "")


def status_name(error: ShoalError) -> str | None:
    """The gRPC status of a deploy.client.CallError; that class is not imported, as it brings grpc with it."""
    code = getattr(error, "code", None)
    return code if isinstance(code, str) else None
