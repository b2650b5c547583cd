"""Every rule a request must keep, on either wire: one error per rule, with the value. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from deploy.text.messages import ChatMessage
from model_shards.errors import InvalidRequestError, UnknownModelError
from model_shards.sampling import SamplingParams

ROLES = ("system", "user", "assistant")
MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256
MAX_LOGPROBS = 20
MAX_N = 16
# 0.01, as a float of gRPC holds it: a little less.
_LEAST_REPETITION = 0.01 - 1e-9
MAX_MESSAGES = 4096
DEFAULT_COMPLETION_TOKENS = 16
# No tokenizer makes a token of more bytes than this on average: longer text cannot fit, so it is not even tokenized.
_MAX_BYTES_PER_TOKEN = 64


class BodyTooLargeError(InvalidRequestError):
    """The request is larger than any request is read; HTTP has a status of its own for it."""


@dataclass(frozen=True)
class ModelLimits:
    """What the served model can take."""

    name: str
    vocab_size: int
    max_model_len: int  # tokens of prompt and output


@dataclass(frozen=True)
class SamplingFields:
    """The sampling part of a request as the client sent it; None where it sent nothing."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logprobs: int | None = None
    n: int | None = None


def check_model(name: str, limits: ModelLimits) -> None:
    """An empty name means the served model."""
    if name not in ("", limits.name):
        raise UnknownModelError(f"model {name!r} is not served here; the served model is {limits.name!r}")


def check_messages(messages: Sequence[ChatMessage], limits: ModelLimits) -> None:
    """At least one message, known roles, not more text than could ever fit."""
    if not messages:
        raise InvalidRequestError("messages must hold at least one message, got none")
    if len(messages) > MAX_MESSAGES:
        raise InvalidRequestError(f"messages must hold at most {MAX_MESSAGES} messages, got {len(messages)}")
    for index, message in enumerate(messages):
        if message.role not in ROLES:
            raise InvalidRequestError(f"messages[{index}].role must be one of {', '.join(ROLES)}, got {message.role!r}")
    check_text("messages", "".join(message.content for message in messages), limits)


def check_text(field: str, text: str, limits: ModelLimits) -> None:
    """Refuses text that cannot fit the context before it costs a tokenization."""
    most = limits.max_model_len * _MAX_BYTES_PER_TOKEN
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise InvalidRequestError(f"{field} must be valid Unicode, got a lone surrogate at {error.start}") from None
    if size > most:
        raise InvalidRequestError(
            f"{field} must be at most {most} bytes (a context of {limits.max_model_len} tokens), got {size}"
        )


def check_token_ids(ids: Sequence[int], limits: ModelLimits) -> None:
    """Every id inside the vocabulary, and no more of them than the context holds."""
    if len(ids) > limits.max_model_len:
        raise InvalidRequestError(
            f"token_ids must hold at most {limits.max_model_len} ids (the context), got {len(ids)}"
        )
    for index, token in enumerate(ids):
        if not 0 <= token < limits.vocab_size:
            raise InvalidRequestError(f"token_ids[{index}] must be 0 to {limits.vocab_size - 1}, got {token}")


def resolve_max_tokens(prompt_tokens: int, fields: SamplingFields, default: int | None, limits: ModelLimits) -> int:
    """The number of tokens to generate. `default` None means what is left of the context.

    Raises InvalidRequestError when the prompt is empty, or prompt and output do not fit the context together.
    """
    if prompt_tokens == 0:
        raise InvalidRequestError("the prompt must hold at least one token, got none")
    if prompt_tokens >= limits.max_model_len:
        raise InvalidRequestError(
            f"the prompt must leave room for one token in a context of {limits.max_model_len} tokens, "
            f"got {prompt_tokens} tokens"
        )
    left = limits.max_model_len - prompt_tokens
    if fields.max_tokens is None:
        return left if default is None else min(default, left)
    if fields.max_tokens < 1:
        raise InvalidRequestError(f"max_tokens must be at least 1, got {fields.max_tokens}")
    if fields.max_tokens > left:
        raise InvalidRequestError(
            f"prompt and max_tokens must fit a context of {limits.max_model_len} tokens, "
            f"got {prompt_tokens} + {fields.max_tokens}"
        )
    return fields.max_tokens


def sampling_params(fields: SamplingFields) -> SamplingParams:
    """Checked sampling settings; without a seed where the client sent none."""
    if fields.n is not None and not 1 <= fields.n <= MAX_N:
        raise InvalidRequestError(f"n must be 1 to {MAX_N}, got {fields.n}")
    _check_stop(fields.stop)
    if fields.top_k is not None and fields.top_k < 0:
        raise InvalidRequestError(f"top_k must be at least 0, got {fields.top_k}")
    if fields.seed is not None and not -(2**63) <= fields.seed < 2**64:
        raise InvalidRequestError(f"seed must be -2**63 to 2**64 - 1, got {fields.seed}")
    if fields.logprobs is not None and not 0 <= fields.logprobs <= MAX_LOGPROBS:
        raise InvalidRequestError(f"logprobs must be 0 to {MAX_LOGPROBS}, got {fields.logprobs}")
    top_p = _in_range("top_p", fields.top_p, 0.0, 1.0, 1.0)
    return SamplingParams(
        temperature=_in_range("temperature", fields.temperature, 0.0, 2.0, 1.0),
        # No probability is no token at all; the smallest set that holds a token is the best one.
        top_p=top_p or 1.0,
        top_k=(fields.top_k or 0) if top_p else 1,
        # Further out the penalised logits overflow, and no token can be told from another.
        repetition_penalty=_in_range("repetition_penalty", fields.repetition_penalty, _LEAST_REPETITION, 100.0, 1.0),
        presence_penalty=_in_range("presence_penalty", fields.presence_penalty, -2.0, 2.0, 0.0),
        frequency_penalty=_in_range("frequency_penalty", fields.frequency_penalty, -2.0, 2.0, 0.0),
        seed=None if fields.seed is None else fields.seed % 2**64,  # a negative one by its two's complement
        logprobs=fields.logprobs,
    )


def _in_range(name: str, value: float | None, low: float, high: float, default: float) -> float:
    if value is None:
        return default
    # NaN compares false with everything, so it fails here too.
    if not low <= value <= high:
        raise InvalidRequestError(f"{name} must be {low:g} to {high:g}, got {value}")
    return value


def _check_stop(stop: tuple[str, ...]) -> None:
    if len(stop) > MAX_STOP_STRINGS:
        raise InvalidRequestError(f"stop must hold at most {MAX_STOP_STRINGS} strings, got {len(stop)}")
    for index, text in enumerate(stop):
        if not 1 <= len(text) <= MAX_STOP_LENGTH:
            raise InvalidRequestError(f"stop[{index}] must be 1 to {MAX_STOP_LENGTH} characters long, got {len(text)}")
