"""What one token stands for, in bytes: decoding it alone would lose part of a character, a leading space, or its name.

vocabulary  "ĠðŁĺ"   byte-level: a character for each byte          -> b" \xf0\x9f\x98"
            "<0xF0>"  byte fallback: the byte by its number          -> b"\xf0"
            "▁whale"  a mark where a space was (Metaspace, Replace)  -> b" whale"
"""

import json
import re
from collections.abc import Iterator, Mapping

from tokenizers import Tokenizer

_BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's character for each byte: printable ones stand for themselves, the others follow from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + at): byte for at, byte in enumerate(others)}


_BYTE_OF = _byte_level_alphabet()


class TokenBytes:
    """Bytes and a name for every id. Immutable, as the tokenizer is from then on."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._added = {token_id: token.content for token_id, token in tokenizer.get_added_tokens_decoder().items()}
        steps = list(_decoder_steps(tokenizer))
        kinds = {step["type"] for step in steps}
        self._byte_level = "ByteLevel" in kinds
        self._byte_fallback = "ByteFallback" in kinds
        self._replacements = [pair for step in steps for pair in _replacements(step)]

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes that the token adds within a text; an added token's are its own text, those of no token empty."""
        added, piece = self._added.get(token_id), self._tokenizer.id_to_token(token_id)
        if added is not None or piece is None:
            return (added or "").encode()
        if self._byte_level and all(character in _BYTE_OF for character in piece):
            return bytes(_BYTE_OF[character] for character in piece)
        if self._is_byte(token_id):
            return bytes.fromhex(piece[3:5])
        if not self._replacements:
            text: str = self._tokenizer.decode([token_id], skip_special_tokens=False)
            return text.encode()
        for mark, text in self._replacements:
            piece = piece.replace(mark, text)
        return piece.encode()

    def text_of(self, token_id: int) -> str:
        r"""The token as text, no two alike: `bytes:\xf0\x9f` for one that is no whole UTF-8, `token_id:5` for no token.

        A byte of a byte fallback is always written as a byte: its character may be another token.
        """
        data = self.bytes_of(token_id)
        if not data:
            return f"token_id:{token_id}"
        text = data.decode(errors="replace")
        if text.encode() == data and not self._is_byte(token_id):
            return text
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def _is_byte(self, token_id: int) -> bool:
        if not self._byte_fallback or token_id in self._added:
            return False
        return _BYTE_PIECE.fullmatch(self._tokenizer.id_to_token(token_id) or "") is not None


def _decoder_steps(tokenizer: Tokenizer) -> Iterator[Mapping[str, object]]:
    """The decoder's parts in order, each with its `type`; none when tokens are simply joined."""
    if tokenizer.decoder is None:
        return
    decoder = json.loads(tokenizer.decoder.__getstate__())
    yield from decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]


def _replacements(step: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """What a part of the decoder writes in place of a mark, the same wherever the token stands."""
    pattern = step.get("pattern")
    if step["type"] == "Metaspace":
        yield str(step["replacement"]), " "
    elif step["type"] == "Replace" and isinstance(pattern, dict) and "String" in pattern:
        yield str(pattern["String"]), str(step["content"])
