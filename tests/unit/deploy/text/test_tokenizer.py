"""The tokenizer of a directory against transformers', and every file that cannot be read."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from deploy.models import default_model_directory
from deploy.text import ChatMessage, ChatTokenizer
from model_shards.errors import CheckpointError, InvalidRequestError

DIRECTORY = default_model_directory()
TOKENIZER = ChatTokenizer.load(DIRECTORY)
HF = PreTrainedTokenizerFast.from_pretrained(DIRECTORY)
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
PIECES = [
    BOS,
    EOS,
    "<｜",
    "User: ",
    "Assistant:",
    "  ",
    "\n\n",
    "\t",
    "123",
    "def f(x):",
    "é",
    "你好",
    "😀",
    "👩‍👩‍👧",
    "\u200d",
    "\0",
]
TEXTS = st.lists(st.text(st.characters(codec="utf-8"), max_size=10) | st.sampled_from(PIECES), max_size=8).map("".join)
# Ids of tokens, special ones among them, and a few that no token has.
IDS = st.lists(st.integers(0, 4095) | st.integers(0, 260) | st.integers(4096, 9000), max_size=20)


def copy_directory(target: Path, config: dict[str, object] | None = None, **added_token: object) -> Path:
    """The embedded tokenizer with other settings, and one more added token in tokenizer.json if it is described."""
    for file in DIRECTORY.glob("*.json"):
        shutil.copy(file, target)
    values = json.loads((target / "tokenizer_config.json").read_text())
    (target / "tokenizer_config.json").write_text(json.dumps({**values, **(config or {})}))
    if added_token:
        tokenizer = json.loads((target / "tokenizer.json").read_text())
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
        tokenizer["added_tokens"].append({"id": 4096, **flags, **added_token})
        (target / "tokenizer.json").write_text(json.dumps(tokenizer))
    return target


@settings(max_examples=30, deadline=None)
@given(text=TEXTS)
@example("")
@example(f"a{EOS}b {BOS}")
def test_encoding_equals_that_of_transformers(text: str) -> None:
    assert TOKENIZER.encode(text) == HF.encode(text)


@settings(max_examples=30, deadline=None)
@given(token_ids=IDS)
def test_decoding_equals_that_of_transformers(token_ids: list[int]) -> None:
    assert TOKENIZER.decode(token_ids) == HF.decode(token_ids, skip_special_tokens=True)


@settings(max_examples=30, deadline=None)
@given(text=TEXTS)
def test_decoding_gives_back_the_text_without_its_special_tokens(text: str) -> None:
    plain = text.replace(BOS, "").replace(EOS, "")
    if BOS not in plain and EOS not in plain:  # removing one may leave another behind
        assert TOKENIZER.decode(TOKENIZER.encode(text)) == plain


@settings(max_examples=30, deadline=None)
@given(token_id=st.integers(0, 8300))
def test_a_token_has_text_exactly_when_decoding_shows_it(token_id: int) -> None:
    assert TOKENIZER.has_text(token_id) == (TOKENIZER.decode([token_id]) != "")


def test_ids_and_size_are_those_of_transformers() -> None:
    assert (TOKENIZER.bos_token_id, TOKENIZER.eos_token_ids) == (HF.bos_token_id, (HF.eos_token_id,))
    assert TOKENIZER.vocab_size == len(HF)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, [0, 3366]),
        ({"add_eos_token": True}, [0, 3366, 1]),
        ({"add_bos_token": False}, [3366]),
        ({"add_bos_token": False, "add_eos_token": True}, [3366, 1]),
        ({"add_bos_token": None}, [3366]),
        ({"add_bos_token": None, "add_eos_token": None}, [0, 3366]),  # as tokenizer.json's post processor says
        ({"bos_token": None}, [3366]),
    ],
)
def test_the_config_says_which_tokens_surround_a_text(
    tmp_path: Path, config: dict[str, object], expected: list[int]
) -> None:
    word = HF.convert_tokens_to_ids("the")
    assert word is not None
    ids = ChatTokenizer.load(copy_directory(tmp_path, config)).encode("the")
    assert ids == [word if token_id == 3366 else token_id for token_id in expected]


@pytest.mark.parametrize("named", ["<mask>", {"__type": "AddedToken", "content": "<mask>", "lstrip": True}])
@pytest.mark.parametrize("flags", [{"special": True}, {"special": True, "lstrip": True}, {"special": False}])
@pytest.mark.parametrize("text", ["a  <mask>  b", "x<mask>y", "<mask>"])
def test_added_tokens_keep_the_flags_of_the_tokenizer_file(
    tmp_path: Path, named: object, flags: dict[str, bool], text: str
) -> None:
    directory = copy_directory(tmp_path, {"mask_token": named}, content="<mask>", **flags)
    tokenizer, reference = ChatTokenizer.load(directory), PreTrainedTokenizerFast.from_pretrained(directory)
    ids = tokenizer.encode(text)
    assert ids == reference.encode(text)
    assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True)
    assert not tokenizer.has_text(4096)


def test_an_added_token_that_is_not_special_has_text(tmp_path: Path) -> None:
    tokenizer = ChatTokenizer.load(copy_directory(tmp_path, content="<think>"))
    assert tokenizer.has_text(4096)
    assert tokenizer.decode([4096]) == "<think>"
    assert tokenizer.vocab_size == 4097


def test_limits_that_training_left_in_the_file_do_not_shorten_or_pad_a_text(tmp_path: Path) -> None:
    directory = copy_directory(tmp_path)
    values = json.loads((directory / "tokenizer.json").read_text())
    values["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    values["padding"] = {
        "strategy": {"Fixed": 50},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 1,
        "pad_type_id": 0,
        "pad_token": EOS,
    }
    (directory / "tokenizer.json").write_text(json.dumps(values))
    text = "one two three four five six seven"
    assert ChatTokenizer.load(directory).encode(text) == TOKENIZER.encode(text)


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [7, 1]}, {"eos_token_id": 9}, (1, 7, 9)),
        ({"eos_token_id": 5}, {}, (1, 5)),
        ({}, {"eos_token_id": None}, (1,)),
        (None, None, (1,)),
    ],
)
def test_end_tokens_come_from_all_files_once(
    tmp_path: Path, generation: object, config: object, expected: tuple[int, ...]
) -> None:
    directory = copy_directory(tmp_path)
    for name, values in (("generation_config.json", generation), ("config.json", config)):
        (directory / name).unlink()
        if values is not None:
            (directory / name).write_text(json.dumps(values))
    assert ChatTokenizer.load(directory).eos_token_ids == expected


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (None, "is missing"),
        (b"", "is not valid JSON"),
        (b'{"version": ', "is not valid JSON"),
        (b"\xff\xfe", "is not valid JSON"),
        (b"[]", "must hold a JSON object, got list"),
    ],
)
def test_a_missing_or_damaged_file_is_named(tmp_path: Path, file: str, content: bytes | None, rule: str) -> None:
    path = copy_directory(tmp_path) / file
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError) as refused:
        ChatTokenizer.load(tmp_path)
    assert str(path) in str(refused.value)
    assert rule in str(refused.value)


@pytest.mark.parametrize("values", [{}, {"model": {"type": "BPE", "vocab": {"a": "b"}, "merges": []}}, {"model": 3}])
def test_json_that_is_no_tokenizer_is_named(tmp_path: Path, values: object) -> None:
    copy_directory(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=rf"^{tmp_path}/tokenizer\.json is not a valid tokenizer: "):
        ChatTokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("bos_token", "<nowhere>", "must be a token of tokenizer.json"),
        ("eos_token", {"content": "<nowhere>"}, "must be a token of tokenizer.json"),
        ("eos_token", 3, "must be a token's text"),
        ("eos_token", "", "must be a token's text"),
        ("pad_token", {"content": 5}, "must be a token's text"),
        ("add_bos_token", "yes", "must be true or false"),
        ("chat_template", 3, "must be a string, or a list"),
        ("chat_template", [], "must be a string, or a list"),
        ("chat_template", [{"name": "tool_use", "template": "x"}], 'one "default"'),
        ("chat_template", [{"name": "default"}], 'one "default"'),
        ("chat_template", "{{ messages", "line 1 of the template"),
    ],
)
def test_a_refused_setting_is_named_with_its_file_and_key(tmp_path: Path, key: str, value: object, rule: str) -> None:
    with pytest.raises(CheckpointError) as refused:
        ChatTokenizer.load(copy_directory(tmp_path, {key: value}))
    assert f"{tmp_path / 'tokenizer_config.json'}: {key}" in str(refused.value)
    assert rule in str(refused.value)


def test_a_template_file_goes_before_the_config(tmp_path: Path) -> None:
    copy_directory(tmp_path, {"chat_template": "from the config"})
    hello = [ChatMessage("user", "hello")]
    assert TOKENIZER.decode(ChatTokenizer.load(tmp_path).render_chat(hello)) == "from the config"
    (tmp_path / "chat_template.jinja").write_text("from the file: é {{ messages[0].content }}", encoding="utf-8")
    assert TOKENIZER.decode(ChatTokenizer.load(tmp_path).render_chat(hello)) == "from the file: é hello"


def test_the_default_of_named_templates_is_taken(tmp_path: Path) -> None:
    templates = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    tokenizer = ChatTokenizer.load(copy_directory(tmp_path, {"chat_template": templates}))
    assert tokenizer.decode(tokenizer.render_chat([ChatMessage("user", "hello")])) == "plain"


@pytest.mark.parametrize(
    ("content", "rule"), [(b"\xff", "cannot be read"), (b"{% if %}", "line 1 of"), (b"a\n{% break %}", "compiled")]
)
def test_a_damaged_template_file_is_named(tmp_path: Path, content: bytes, rule: str) -> None:
    (copy_directory(tmp_path) / "chat_template.jinja").write_bytes(content)
    with pytest.raises(CheckpointError) as refused:
        ChatTokenizer.load(tmp_path)
    assert str(tmp_path / "chat_template.jinja") in str(refused.value)
    assert rule in str(refused.value)


def test_a_directory_without_a_template_has_no_chat(tmp_path: Path) -> None:
    tokenizer = ChatTokenizer.load(copy_directory(tmp_path, {"chat_template": None}))
    assert tokenizer.encode("hi") == TOKENIZER.encode("hi")
    with pytest.raises(InvalidRequestError, match=r"has no chat template; send a completion request"):
        tokenizer.render_chat([ChatMessage("user", "hi")])
