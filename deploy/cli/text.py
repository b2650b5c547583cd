"""Text from the command line, from a pipe or from a terminal that goes into a message must be UTF-8."""

import click

from model_shards.errors import InvalidRequestError

DEFAULT_ADDRESS = "127.0.0.1:9000"


def check_text(what: str, text: str) -> str:
    """The text itself. Raises InvalidRequestError, naming the byte, when it was not UTF-8.

    Python keeps such a byte as a lone surrogate (PEP 383), which no message can carry.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        position = len(text[: error.start].encode())
        byte = ord(text[error.start]) - 0xDC00
        raise InvalidRequestError(f"{what} must be UTF-8: byte {position} is {byte:#04x}") from error
    return text


def is_text(_ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Callback of an argument or option that is sent. Raises InvalidRequestError."""
    return None if value is None else check_text(param.opts[0], value)


address_option = click.option(
    "--address",
    callback=is_text,
    default=DEFAULT_ADDRESS,
    show_default=True,
    metavar="HOST:PORT",
    help="The gRPC port.",
)
