"""Text and tokens: the checkpoint's tokenizer, its chat template, and detokenization of a stream."""

from deploy.text.detokenizer import IncrementalDetokenizer
from deploy.text.messages import ChatMessage
from deploy.text.stop import TextDelta
from deploy.text.tokenizer import ChatTokenizer

__all__ = ["ChatMessage", "ChatTokenizer", "IncrementalDetokenizer", "TextDelta"]
