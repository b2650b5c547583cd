"""Fields of the OpenAI API, and of servers that extend it, that Shoal does not serve.

Leaving one out of account would give another answer than the client asked for, so it is refused by name, unless its
value asks for nothing. Whatever is not listed here says nothing about the answer (user, metadata, store, service_tier,
...) and is ignored.
"""

from collections.abc import Mapping

from pydantic_core import to_json

from model_shards.errors import InvalidRequestError

# Field -> the values that ask for nothing; null always does.
_SAMPLING: Mapping[str, tuple[object, ...]] = {
    "logit_bias": ({},),
    "min_p": (0, 0.0),
    "min_tokens": (0,),
    "stop_token_ids": ([],),
    "bad_words": ([],),
    "use_beam_search": (False,),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
}
UNSERVED_COMPLETION: Mapping[str, tuple[object, ...]] = {
    **_SAMPLING,
    "suffix": ("",),
    "echo": (False,),
}
UNSERVED_CHAT: Mapping[str, tuple[object, ...]] = {
    **_SAMPLING,
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),  # without tools there is nothing to choose
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "documents": ([],),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
}
# Of one message.
UNSERVED_MESSAGE: Mapping[str, tuple[object, ...]] = {
    "tool_calls": ([],),
    "function_call": (),
    "audio": (),
}
_MAX_SHOWN = 60


def refuse_unserved(fields: Mapping[str, object], unserved: Mapping[str, tuple[object, ...]]) -> None:
    """Raises InvalidRequestError for the first of `fields` that asks for something that is not served."""
    for name, harmless in unserved.items():
        value = fields.get(name)
        if value is None or any(type(value) is type(entry) and value == entry for entry in harmless):
            continue
        shown = to_json(value).decode()
        if len(shown) > _MAX_SHOWN:
            shown = f"{shown[: _MAX_SHOWN - 3]}..."
        rule = " or ".join(to_json(entry).decode() for entry in harmless) or "left out"
        raise InvalidRequestError(f"{name} is not served: it must be {rule}, got {shown}")
