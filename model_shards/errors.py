"""The one error tree of Shoal.

    ShoalError
    ├── InvalidRequestError     the client should change the request
    ├── UnknownModelError       the client asked for a model that is not served
    ├── UnauthenticatedError    the client should send a valid key
    ├── OverloadedError         the client should retry after `retry_after_s`
    ├── UnavailableError        the client should retry: not ready, draining, or a rank is lost
    ├── FailedRequestError      the operator should look into the log: computing this request fails, again and again
    ├── DeadlineError           the client's deadline passed
    ├── ConfigError             the operator should change the configuration
    ├── CheckpointError         the operator should mend the checkpoint directory
    ├── CapacityError           the operator should give more memory or devices, or ask for less
    └── EpochAbortedError       the runtime should build the next epoch and run the step again

A message states the rule and the value. Every class is picklable: it crosses Ray.
`deploy.gateway.status` maps each class to a gRPC and an HTTP status.
"""


class ShoalError(Exception):
    """Root of the tree; never raised itself."""


class InvalidRequestError(ShoalError):
    """The request breaks a rule; the message names the rule and the value."""


class UnknownModelError(ShoalError):
    """The named model is not the served one."""


class UnauthenticatedError(ShoalError):
    """The key is missing or not known."""


class OverloadedError(ShoalError):
    """The service is full; retry after `retry_after_s` seconds."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message, retry_after_s)
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return str(self.args[0])


class UnavailableError(ShoalError):
    """The service cannot answer now: starting, draining, or a rank was lost."""


class FailedRequestError(ShoalError):
    """This request cannot be computed, others can; sending it again would fail again."""


class DeadlineError(ShoalError):
    """The deadline of the request passed before it finished."""


class ConfigError(ShoalError):
    """A setting breaks a rule; the message names the setting, the rule and the value."""


class CheckpointError(ShoalError):
    """A checkpoint file is missing, damaged or does not fit its config.json."""


class CapacityError(ShoalError):
    """The machine is too small for what was asked; the message carries the numbers."""


class EpochAbortedError(ShoalError):
    """An exchange of the current epoch failed; nothing of the step was committed."""
