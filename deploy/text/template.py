"""The checkpoint's chat template: a Jinja text that turns a conversation into one string.

Rendered as transformers' `apply_chat_template` renders it, which published templates are written against. A template is
the checkpoint's code, so it runs in Jinja's immutable sandbox.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import NoReturn

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from deploy.text.messages import ChatMessage
from model_shards.errors import CheckpointError, InvalidRequestError

# What a faulty template can raise besides Jinja's own errors: it computes with strings, numbers, lists and mappings.
_FAULTS = (
    TemplateError,
    TypeError,
    ValueError,
    LookupError,
    ArithmeticError,
    AttributeError,
    RecursionError,
    MemoryError,  # 'a' * 2**61
)
# What compiling one can raise: Jinja turns it into Python, which has limits of its own (a loose break, deep nesting).
_COMPILE_FAULTS = (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError)


class _RefusedError(Exception):
    """The template called `raise_exception`: it does not know such a conversation."""


class _GenerationTag(Extension):
    """{% generation %} ... {% endgeneration %} marks answers for training; for serving it is its body."""

    tags = {"generation"}  # noqa: RUF012  # Jinja declares it as an instance attribute

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class ChatTemplate:
    """A compiled template and the special tokens it may name (`bos_token`, `eos_token`, ...)."""

    def __init__(self, source: str, place: str, special_tokens: Mapping[str, str]) -> None:
        """`place` says where the source stands, for errors. Raises CheckpointError when it is not valid Jinja."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
        )
        # Jinja's own tojson escapes for HTML.
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = _strftime_now
        self._place = place
        self._special_tokens = dict(special_tokens)
        try:
            self._template = environment.from_string(source)
        except TemplateSyntaxError as error:
            raise CheckpointError(f"{place}, line {error.lineno} of the template: {error.message}") from error
        except _COMPILE_FAULTS as error:
            raise CheckpointError(f"{place}: the chat template cannot be compiled: {error}") from error

    def render(self, messages: Sequence[ChatMessage]) -> str:
        """The conversation as text, up to where the assistant's next answer begins.

        Raises InvalidRequestError when the template refuses the conversation, CheckpointError when it fails.
        """
        try:
            return self._template.render(
                messages=[{"role": message.role, "content": message.content} for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **self._special_tokens,
            )
        except _RefusedError as refusal:
            raise InvalidRequestError(f"the model's chat template refuses these messages: {refusal}") from None
        except _FAULTS as error:
            raise CheckpointError(f"{self._place}: the chat template failed: {error}") from error


def _refuse(message: str) -> NoReturn:
    raise _RefusedError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
