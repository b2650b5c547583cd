"""The checkpoint's tokenizer: tokenizer.json for the tokens, tokenizer_config.json for what surrounds them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from deploy.text.messages import ChatMessage
from deploy.text.template import ChatTemplate
from deploy.text.token_bytes import TokenBytes
from model_shards.errors import CheckpointError, InvalidRequestError
from model_shards.json_keys import JsonKeys

_TOKENIZER = "tokenizer.json"
_CONFIG = "tokenizer_config.json"
_TEMPLATE = "chat_template.jinja"
# The special tokens that have names; a template may use each as a variable.
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class _Surround:
    """Special tokens that `encode` puts around a text, when tokenizer_config.json says so."""

    before: tuple[int, ...]
    after: tuple[int, ...]


class ChatTokenizer:
    """Text to tokens and back. Immutable once loaded, and safe to share between threads."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        special_ids: dict[str, int],  # by name: bos_token, ...
        eos_token_ids: tuple[int, ...],
        surround: _Surround | None,  # None: as tokenizer.json's post processor does
        template: ChatTemplate | None,
    ) -> None:
        self.vocab_size: int = tokenizer.get_vocab_size(with_added_tokens=True)
        self.bos_token_id = special_ids.get("bos_token")
        self.eos_token_ids = eos_token_ids
        self._tokenizer = tokenizer
        self._surround = surround
        self._template = template
        added = tokenizer.get_added_tokens_decoder()
        self._bytes = TokenBytes(tokenizer)
        self._without_text = frozenset(token_id for token_id, token in added.items() if token.special)

    @classmethod
    def load(cls, directory: Path) -> "ChatTokenizer":
        """Reads a Hugging Face directory.

        The template is chat_template.jinja or, without one, `chat_template` of tokenizer_config.json: a string or a
        list of named ones with a "default". A directory without a template has no chat. End tokens are the tokenizer's
        and those of generation_config.json and config.json. Raises CheckpointError naming the file and the key.
        """
        config = JsonKeys.read(directory / _CONFIG)
        tokenizer = _read_tokenizer(directory / _TOKENIZER)
        names = {key: name for key in _NAMED_TOKENS if (name := _token_text(config, key)) is not None}
        ids = {key: _token_id(config, key, name, tokenizer) for key, name in names.items()}
        # Named tokens are special even where tokenizer.json does not mark them so; where it does, its flags stay.
        special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
        tokenizer.add_special_tokens([name for name in names.values() if name not in special])
        eos = [ids["eos_token"]] if "eos_token" in ids else []
        for file in ("generation_config.json", "config.json"):
            if (directory / file).exists():
                eos.extend(JsonKeys.read(directory / file).tokens("eos_token_id", ()))
        return cls(
            tokenizer=tokenizer,
            special_ids=ids,
            eos_token_ids=tuple(dict.fromkeys(eos)),
            surround=_read_surround(config, ids),
            template=_read_template(directory, config, names),
        )

    def encode(self, text: str) -> list[int]:
        """Tokens of a text as the checkpoint's tokenizer makes them, special tokens around it included.

        Special tokens spelled out in the text are read as special tokens, as transformers reads them.
        """
        if self._surround is None:
            return list(self._tokenizer.encode(text).ids)
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return [*self._surround.before, *ids, *self._surround.after]

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text, without special tokens and ids that no token has; U+FFFD stands for bytes that are not UTF-8."""
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=True)
        return text

    def has_text(self, token_id: int) -> bool:
        """Whether `decode` shows the token: it exists and is not special."""
        return token_id not in self._without_text and self._tokenizer.id_to_token(token_id) is not None

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token adds within a text; a special token's are its own text, those of no token empty."""
        return self._bytes.bytes_of(token_id)

    def token_text(self, token_id: int) -> str:
        r"""One token as text, no two alike: its own text, or `bytes:\xf0\x9f` where that is no whole UTF-8."""
        return self._bytes.text_of(token_id)

    def render_chat(self, messages: Sequence[ChatMessage]) -> list[int]:
        """Tokens of a conversation up to where the assistant's answer begins; the template alone adds special tokens.

        The template makes one string of the whole conversation, as in transformers. So a special token spelled out in a
        message is read as that token: a client can end a turn early, within its own conversation only.

        Raises InvalidRequestError when there is no template or it refuses the conversation, CheckpointError when the
        template fails.
        """
        if self._template is None:
            raise InvalidRequestError("this model has no chat template; send a completion request instead")
        return list(self._tokenizer.encode(self._template.render(messages), add_special_tokens=False).ids)


def _read_tokenizer(file: Path) -> Tokenizer:
    JsonKeys.read(file)  # its errors name the file and what is wrong; the tokenizers library's do not
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises no narrower class
        raise CheckpointError(f"{file} is not a valid tokenizer: {error}") from error
    # Limits that training left behind would silently shorten prompts.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _token_text(config: JsonKeys, key: str) -> str | None:
    """A token is written as its text, or as an object with the text as `content`."""
    value = config.raw(key)
    if isinstance(value, dict):
        value = value.get("content")
    if value is None or (isinstance(value, str) and value):
        return value
    raise config.error(key, 'must be a token\'s text, or an object with it as "content"')


def _token_id(config: JsonKeys, key: str, text: str, tokenizer: Tokenizer) -> int:
    token_id: int | None = tokenizer.token_to_id(text)
    if token_id is None:
        raise config.error(key, f"must be a token of {_TOKENIZER}")
    return token_id


def _read_surround(config: JsonKeys, ids: dict[str, int]) -> _Surround | None:
    """`add_bos_token` and `add_eos_token`, where either stands, go before tokenizer.json's post processor.

    The published DeepSeek-V2 tokenizer.json adds nothing by itself; its classes in transformers follow these two.
    """
    if config.raw("add_bos_token") is None and config.raw("add_eos_token") is None:
        return None
    sides: dict[str, tuple[int, ...]] = {}
    for key in ("bos_token", "eos_token"):
        wanted = config.flag(f"add_{key}")
        sides[key] = (ids[key],) if wanted and key in ids else ()
    return _Surround(sides["bos_token"], sides["eos_token"])


def _read_template(directory: Path, config: JsonKeys, names: dict[str, str]) -> ChatTemplate | None:
    file = directory / _TEMPLATE
    if file.exists():
        try:
            return ChatTemplate(file.read_text(encoding="utf-8"), str(file), names)
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from error
    place = f"{config.place}: chat_template"
    value = config.raw("chat_template")
    if value is None:
        return None
    if isinstance(value, str):
        return ChatTemplate(value, place, names)
    if isinstance(value, list):
        for entry in value:
            if isinstance(entry, dict) and entry.get("name") == "default" and isinstance(entry.get("template"), str):
                return ChatTemplate(entry["template"], f'{place} "default"', names)
    raise CheckpointError(f'{place} must be a string, or a list of {{"name", "template"}} objects with one "default"')
