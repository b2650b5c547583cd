"""One turn of a conversation."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ChatMessage:
    """`role` is what the chat template knows: system, user or assistant."""

    role: str
    content: str
