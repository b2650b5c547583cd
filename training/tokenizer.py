"""The demonstration model's tokenizer: a byte-level BPE of its own, with DeepSeek-V2's chat format."""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
BOS_ID, EOS_ID = 0, 1
# How DeepSeek-V2 was taught to chat.
CHAT_TEMPLATE = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + eos_token }}"
    "{% elif message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE that splits digits apart, as DeepSeek-V2's does. Raises ValueError when the text is too little."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(BOS, special=True), AddedToken(EOS, special=True)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS}:0 $A:0", pair=f"{BOS}:0 $A:0 {BOS}:1 $B:1", special_tokens=[(BOS, BOS_ID)]
    )
    if tokenizer.get_vocab_size() != vocab_size or [tokenizer.token_to_id(token) for token in (BOS, EOS)] != [0, 1]:
        raise ValueError(f"the text gives {tokenizer.get_vocab_size()} tokens, {vocab_size} are needed")
    return tokenizer


def prompt_text(question: str) -> str:
    """One user turn up to where the answer begins, as the template renders it, without the begin token."""
    return f"User: {question}\n\nAssistant:"


def answer_text(answer: str) -> str:
    """What follows it, without the end token."""
    return f" {answer}"


def write_tokenizer(tokenizer: Tokenizer, directory: Path, max_length: int) -> None:
    """tokenizer.json and tokenizer_config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    # Not indented: the file is a third of the size.
    (directory / "tokenizer.json").write_text(tokenizer.to_str(pretty=False), encoding="utf-8")
    text = json.dumps(tokenizer_config(max_length), indent=2, ensure_ascii=False)
    (directory / "tokenizer_config.json").write_text(f"{text}\n", encoding="utf-8")


def tokenizer_config(max_length: int) -> dict[str, object]:
    """What surrounds the tokens: special tokens and the chat template."""

    def token(text: str) -> dict[str, object]:
        flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
        return {"__type": "AddedToken", "content": text, **flags}

    return {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": token(BOS),
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": token(EOS),
        "model_max_length": max_length,
        "pad_token": token(EOS),
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": None,
    }
