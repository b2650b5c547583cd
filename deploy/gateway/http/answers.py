"""Response objects as the OpenAI API has them, whole and in chunks."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

from cluster.request import FinishReason, TokenLogprob
from deploy.gateway.choices import Accepted
from deploy.gateway.generation import GenerationEvent, Usage
from deploy.gateway.service import Gateway

Json: TypeAlias = Mapping[str, "Json"] | Sequence["Json"] | str | int | float | bool | None
JsonObject: TypeAlias = dict[str, Json]

_FINISH_REASONS = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}


def model_object(gateway: Gateway) -> JsonObject:
    """The served model."""
    model = gateway.model
    return {
        "id": model.name,
        "object": "model",
        "created": 0,
        "owned_by": "shoal",
        "max_model_len": model.max_model_len,
    }


def usage_object(usage: Usage | None) -> Json:
    """OpenAI's usage."""
    if usage is None:
        return None
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def finish_reason(event: GenerationEvent) -> str | None:
    """OpenAI's finish_reason."""
    return None if event.finish_reason is None else _FINISH_REASONS[event.finish_reason]


def _by_choice(events: Sequence[GenerationEvent]) -> list[list[GenerationEvent]]:
    """The events of each choice, in the order of the choices."""
    choices: dict[int, list[GenerationEvent]] = {}
    for event in events:
        choices.setdefault(event.index, []).append(event)
    return [choices[index] for index in sorted(choices)]


def _text(events: Sequence[GenerationEvent]) -> str:
    return "".join(event.text for event in events)


def _finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI's value for a token that is too unlikely to say."""
    return max(logprob, -9999.0)


class CompletionAnswer:
    """Objects of /v1/completions."""

    def __init__(self, accepted: Accepted, gateway: Gateway, logprobs: bool) -> None:
        self._accepted = accepted
        self._model = gateway.model.name
        self._tokenizer = gateway.tokenizer
        self._logprobs = logprobs

    def chunks(self, event: GenerationEvent) -> Iterator[JsonObject]:
        """What one event adds to a stream."""
        yield self._object([self._choice([event])])

    def whole(self, events: Sequence[GenerationEvent]) -> JsonObject:
        """All events as one answer."""
        choices = [self._choice(choice) for choice in _by_choice(events)]
        return {**self._object(choices), "usage": usage_object(events[-1].usage)}

    def usage(self, event: GenerationEvent) -> JsonObject:
        """The extra chunk that stream_options.include_usage asks for."""
        return {**self._object([]), "usage": usage_object(event.usage)}

    def _object(self, choices: list[Json]) -> JsonObject:
        return {
            "id": self._accepted.id,
            "object": "text_completion",
            "created": self._accepted.created,
            "model": self._model,
            "choices": choices,
        }

    def _choice(self, events: Sequence[GenerationEvent]) -> Json:
        return {
            "index": events[-1].index,
            "text": _text(events),
            "logprobs": self._logprobs_of(events) if self._logprobs else None,
            "finish_reason": finish_reason(events[-1]),
        }

    def _logprobs_of(self, events: Sequence[GenerationEvent]) -> Json:
        name = self._tokenizer.token_text
        positions = [position for event in events for position in event.logprobs]
        return {
            "tokens": [name(token) for event in events for token in event.token_ids],
            "token_logprobs": [_finite(position.logprob) for position in positions],
            "top_logprobs": [{name(token): _finite(value) for token, value in position.top} for position in positions],
            "text_offset": [offset for event in events for offset in event.text_offsets],
        }


class ChatAnswer:
    """Objects of /v1/chat/completions."""

    def __init__(self, accepted: Accepted, gateway: Gateway, logprobs: bool) -> None:
        self._accepted = accepted
        self._model = gateway.model.name
        self._tokenizer = gateway.tokenizer
        self._logprobs = logprobs
        self._opened: set[int] = set()  # choices whose turn was opened

    def chunks(self, event: GenerationEvent) -> Iterator[JsonObject]:
        """What one event adds to a stream; the first one of a choice opens the assistant's turn before that."""
        if event.index not in self._opened:
            self._opened.add(event.index)
            opening: Json = {"role": "assistant", "content": ""}
            yield self._chunk([{"index": event.index, "delta": opening, "logprobs": None, "finish_reason": None}])
        choice: Json = {
            "index": event.index,
            "delta": {"content": event.text} if event.text else {},
            "logprobs": self._logprobs_of([event]),
            "finish_reason": finish_reason(event),
        }
        yield self._chunk([choice])

    def whole(self, events: Sequence[GenerationEvent]) -> JsonObject:
        """All events as one answer."""
        choices: list[Json] = [
            {
                "index": choice[-1].index,
                "message": {"role": "assistant", "content": _text(choice), "refusal": None},
                "logprobs": self._logprobs_of(choice),
                "finish_reason": finish_reason(choice[-1]),
            }
            for choice in _by_choice(events)
        ]
        return {**self._object("chat.completion", choices), "usage": usage_object(events[-1].usage)}

    def usage(self, event: GenerationEvent) -> JsonObject:
        """The extra chunk that stream_options.include_usage asks for."""
        return {**self._chunk([]), "usage": usage_object(event.usage)}

    def _chunk(self, choices: list[Json]) -> JsonObject:
        return self._object("chat.completion.chunk", choices)

    def _object(self, kind: str, choices: list[Json]) -> JsonObject:
        return {
            "id": self._accepted.id,
            "object": kind,
            "created": self._accepted.created,
            "model": self._model,
            "choices": choices,
        }

    def _logprobs_of(self, events: Sequence[GenerationEvent]) -> Json:
        if not self._logprobs:
            return None
        entries: list[Json] = []
        for event in events:
            for token, logprob in zip(event.token_ids, event.logprobs, strict=True):
                entries.append({**self._token(token, logprob.logprob), "top_logprobs": self._top(logprob)})
        return {"content": entries, "refusal": None}

    def _top(self, logprob: TokenLogprob) -> Json:
        return [self._token(token, value) for token, value in logprob.top]

    def _token(self, token: int, logprob: float) -> JsonObject:
        # An id that no token has stands for no bytes.
        data = list(self._tokenizer.token_bytes(token)) or None
        return {"token": self._tokenizer.token_text(token), "logprob": _finite(logprob), "bytes": data}
