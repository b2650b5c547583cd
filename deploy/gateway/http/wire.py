"""Request bodies as the OpenAI API has them.

A null is a field that was not given: OpenAI's own client sends some. Fields that Shoal does not serve are refused where
they would change the answer (`unserved.py`); others that it does not know are ignored.
"""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from deploy.gateway.http.unserved import UNSERVED_CHAT, UNSERVED_COMPLETION, UNSERVED_MESSAGE, refuse_unserved
from deploy.gateway.service import Prompt
from deploy.gateway.validation import SamplingFields
from deploy.text.messages import ChatMessage
from model_shards.errors import InvalidRequestError


def _rule(text: str) -> WrapValidator:
    """One error for a field of several types, in place of one for each type."""

    def validate(value: object, handler: ValidatorFunctionWrapHandler) -> object:
        try:
            return handler(value)
        except ValidationError:
            # Handed over as a value: Pydantic reads braces in a text as placeholders.
            raise PydanticCustomError("rule", "{rule}", {"rule": text}) from None

    return WrapValidator(validate)


# A list of a million wrong entries has one error.
_Texts = Annotated[list[str], Field(fail_fast=True)]
_Ids = Annotated[list[int], Field(fail_fast=True)]
_Stop = Annotated[str | _Texts | None, _rule("must be a string or a list of strings")]
_Prompt = Annotated[
    str | _Ids | _Texts | Annotated[list[_Ids], Field(fail_fast=True)],
    _rule("must be a string, a list of token ids, or a list of either"),
]


class _Body(BaseModel):
    # NaN and infinity are not JSON, but the parser takes them: let the rules name the value.
    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=True)
    unserved: ClassVar[Mapping[str, tuple[object, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _given(cls, data: object) -> object:
        """The fields that were given: all that are required, and of the others those that are not null."""
        if not isinstance(data, dict):
            return data
        refuse_unserved(data, cls.unserved)
        required = {name for name, field in cls.model_fields.items() if field.is_required()}
        return {name: value for name, value in data.items() if value is not None or name in required}


class StreamOptions(_Body):
    """What a stream also carries."""

    include_usage: bool = False


class _SamplingBody(_Body):
    model: str = ""
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: _Stop = None
    ignore_eos: bool = False
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    n: int | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    def _fields(self, max_tokens: int | None, logprobs: int | None) -> SamplingFields:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return SamplingFields(
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=self.seed,
            stop=stop,
            ignore_eos=self.ignore_eos,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logprobs=logprobs,
            n=self.n,
        )


class CompletionBody(_SamplingBody):
    """POST /v1/completions."""

    unserved = UNSERVED_COMPLETION

    prompt: _Prompt
    logprobs: int | None = None
    best_of: int | None = None

    def fields(self) -> SamplingFields:
        """The sampling part."""
        return self._fields(self.max_tokens, self.logprobs)

    def prompts(self) -> list[Prompt]:
        """One or more; a list of numbers is one prompt."""
        if self.best_of not in (None, self.n or 1):
            raise InvalidRequestError(f"best_of must be n, {self.n or 1}, got {self.best_of}")
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if not prompt:
            raise InvalidRequestError("prompt must hold at least one token, got an empty list")
        ids = [entry for entry in prompt if isinstance(entry, int)]
        return [ids] if ids else [entry for entry in prompt if not isinstance(entry, int)]


class TextPart(_Body):
    """One part of a message's content."""

    type: Literal["text"]
    text: str


class MessageBody(_Body):
    """One message."""

    unserved = UNSERVED_MESSAGE

    role: str
    content: Annotated[
        str | Annotated[list[TextPart], Field(fail_fast=True)],
        _rule("must be a string or a list of parts of type text"),
    ]

    def message(self) -> ChatMessage:
        """The message with its parts joined; developer is the newer name of the role system."""
        content, role = self.content, "system" if self.role == "developer" else self.role
        return ChatMessage(role, content if isinstance(content, str) else "".join(part.text for part in content))


class ChatBody(_SamplingBody):
    """POST /v1/chat/completions."""

    unserved = UNSERVED_CHAT

    messages: Annotated[list[MessageBody], Field(fail_fast=True)] = Field(default_factory=list)
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None

    def fields(self) -> SamplingFields:
        """The sampling part; max_completion_tokens is the newer name of max_tokens and wins."""
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequestError(f"top_logprobs needs logprobs to be true, got {self.top_logprobs}")
        most = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return self._fields(most, (self.top_logprobs or 0) if self.logprobs else None)
