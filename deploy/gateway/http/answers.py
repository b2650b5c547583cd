"""Response objects as the OpenAI API has them, whole and in chunks."""

from collections.abc import Mapping, Sequence
from typing import TypeAlias

from cluster.request import FinishReason, TokenLogprob
from deploy.gateway.generation import Generation, GenerationEvent, Usage
from deploy.gateway.service import Gateway

Json: TypeAlias = Mapping[str, "Json"] | Sequence["Json"] | str | int | float | bool | None

_FINISH_REASONS = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length", FinishReason.CANCELLED: "stop"}


def usage_object(usage: Usage | None) -> Json:
    """OpenAI's usage."""
    if usage is None:
        return None
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
    }


def finish_reason(event: GenerationEvent) -> str | None:
    """OpenAI's finish_reason."""
    return None if event.finish_reason is None else _FINISH_REASONS[event.finish_reason]


def _finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI's value for a token that is too unlikely to say."""
    return max(logprob, -9999.0)


class CompletionAnswer:
    """Objects of /v1/completions."""

    def __init__(self, generation: Generation, gateway: Gateway, logprobs: bool) -> None:
        self._generation = generation
        self._model = gateway.model.name
        self._tokenizer = gateway.tokenizer
        self._logprobs = logprobs

    def first(self) -> Json:
        """Nothing comes before the first text."""
        return None

    def chunk(self, event: GenerationEvent) -> Json:
        """One event of a stream."""
        return self._object([self._choice(event.text, finish_reason(event), [event])])

    def whole(self, events: Sequence[GenerationEvent]) -> Json:
        """All events as one answer."""
        text = "".join(event.text for event in events)
        choice = self._choice(text, finish_reason(events[-1]), events)
        return {**self._object([choice]), "usage": usage_object(events[-1].usage)}

    def usage(self, event: GenerationEvent) -> Json:
        """The extra chunk that stream_options.include_usage asks for."""
        return {**self._object([]), "usage": usage_object(event.usage)}

    def _object(self, choices: list[Json]) -> dict[str, Json]:
        generation = self._generation
        return {
            "id": generation.id,
            "object": "text_completion",
            "created": generation.created,
            "model": self._model,
            "choices": choices,
        }

    def _choice(self, text: str, reason: str | None, events: Sequence[GenerationEvent]) -> Json:
        logprobs: Json = None
        if self._logprobs:
            name = self._tokenizer.token_text
            positions = [position for event in events for position in event.logprobs]
            logprobs = {
                "tokens": [name(token) for event in events for token in event.token_ids],
                "token_logprobs": [_finite(position.logprob) for position in positions],
                "top_logprobs": [
                    {name(token): _finite(value) for token, value in position.top} for position in positions
                ],
                "text_offset": [offset for event in events for offset in event.text_offsets],
            }
        return {"index": 0, "text": text, "logprobs": logprobs, "finish_reason": reason}


class ChatAnswer:
    """Objects of /v1/chat/completions."""

    def __init__(self, generation: Generation, gateway: Gateway, logprobs: bool) -> None:
        self._generation = generation
        self._model = gateway.model.name
        self._tokenizer = gateway.tokenizer
        self._logprobs = logprobs

    def first(self) -> Json:
        """The chunk that opens the assistant's turn."""
        return self._object("chat.completion.chunk", [self._delta({"role": "assistant", "content": ""}, None, [])])

    def chunk(self, event: GenerationEvent) -> Json:
        """One event of a stream."""
        delta: dict[str, Json] = {"content": event.text} if event.text else {}
        return self._object("chat.completion.chunk", [self._delta(delta, finish_reason(event), [event])])

    def whole(self, events: Sequence[GenerationEvent]) -> Json:
        """All events as one answer."""
        text = "".join(event.text for event in events)
        choice: Json = {
            "index": 0,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": self._logprobs_of(events),
            "finish_reason": finish_reason(events[-1]),
        }
        return {**self._object("chat.completion", [choice]), "usage": usage_object(events[-1].usage)}

    def usage(self, event: GenerationEvent) -> Json:
        """The extra chunk that stream_options.include_usage asks for."""
        return {**self._object("chat.completion.chunk", []), "usage": usage_object(event.usage)}

    def _object(self, kind: str, choices: list[Json]) -> dict[str, Json]:
        generation = self._generation
        return {
            "id": generation.id,
            "object": kind,
            "created": generation.created,
            "model": self._model,
            "choices": choices,
        }

    def _delta(self, delta: Json, reason: str | None, events: Sequence[GenerationEvent]) -> Json:
        return {"index": 0, "delta": delta, "logprobs": self._logprobs_of(events), "finish_reason": reason}

    def _logprobs_of(self, events: Sequence[GenerationEvent]) -> Json:
        if not self._logprobs or not events:
            return None
        entries: list[Json] = []
        for event in events:
            for token, logprob in zip(event.token_ids, event.logprobs, strict=False):
                entries.append({**self._token(token, logprob.logprob), "top_logprobs": self._top(logprob)})
        return {"content": entries, "refusal": None}

    def _top(self, logprob: TokenLogprob) -> Json:
        return [self._token(token, value) for token, value in logprob.top]

    def _token(self, token: int, logprob: float) -> dict[str, Json]:
        # An id that no token has stands for no bytes.
        data = list(self._tokenizer.token_bytes(token)) or None
        return {"token": self._tokenizer.token_text(token), "logprob": _finite(logprob), "bytes": data}
