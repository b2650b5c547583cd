"""Request and response bodies as the OpenAI API has them. Unknown fields are ignored, as OpenAI-compatible servers do."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from deploy.gateway.validation import SamplingFields
from deploy.text.messages import ChatMessage
from model_shards.errors import InvalidRequestError


class _Body(BaseModel):
    # NaN and infinity are not JSON, but Python's parser takes them: let the rules name the value.
    model_config = ConfigDict(extra="ignore", allow_inf_nan=True)


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
    stop: str | list[str] | None = None
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

    prompt: str | list[int] | list[str] | list[list[int]]
    logprobs: int | None = None
    echo: bool = False

    def fields(self) -> SamplingFields:
        """The sampling part."""
        return self._fields(self.max_tokens, self.logprobs)

    def one_prompt(self) -> str | list[int]:
        """The prompt; a list with one prompt is that prompt."""
        if self.echo:
            raise InvalidRequestError("echo must be false, got true")
        prompt = self.prompt
        if isinstance(prompt, str):
            return prompt
        nested = [entry for entry in prompt if not isinstance(entry, int)]
        if not nested:
            return [entry for entry in prompt if isinstance(entry, int)]
        if len(nested) > 1:
            raise InvalidRequestError(f"prompt must be one prompt, got {len(nested)}; send one request each")
        return nested[0]


class TextPart(_Body):
    """One part of a message's content."""

    type: Literal["text"]
    text: str


class MessageBody(_Body):
    """One message."""

    role: str
    content: str | list[TextPart]

    def message(self) -> ChatMessage:
        """The message with its parts joined."""
        content = self.content
        return ChatMessage(self.role, content if isinstance(content, str) else "".join(part.text for part in content))


class ChatBody(_SamplingBody):
    """POST /v1/chat/completions."""

    messages: list[MessageBody] = Field(default_factory=list)
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None

    def fields(self) -> SamplingFields:
        """The sampling part; max_completion_tokens is the newer name of max_tokens and wins."""
        most = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return self._fields(most, (self.top_logprobs or 0) if self.logprobs else None)
