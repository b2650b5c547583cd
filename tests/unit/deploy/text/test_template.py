"""Chat templates: rendered as transformers renders them, in a sandbox, and every fault told apart."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from deploy.models import default_model_directory
from deploy.text import ChatMessage, ChatTokenizer
from deploy.text.template import ChatTemplate
from model_shards.errors import CheckpointError, InvalidRequestError

HF = PreTrainedTokenizerFast.from_pretrained(default_model_directory())
TOKENIZER = ChatTokenizer.load(default_model_directory())
SPECIAL = {"bos_token": HF.bos_token, "eos_token": HF.eos_token, "pad_token": HF.pad_token}
PIECES = [
    HF.bos_token,
    HF.eos_token,
    "{{ 1 + 1 }}",
    "{% if %}",
    "{#",
    "\n\n",
    " ",
    "User: ",
    "<b>&amp;",
    "'",
    '"',
    "😀",
]
CONTENTS = st.lists(st.text(st.characters(codec="utf-8"), max_size=8) | st.sampled_from(PIECES), max_size=5).map(
    "".join
)
MESSAGES = st.lists(
    st.builds(ChatMessage, role=st.sampled_from(["system", "user", "assistant"]), content=CONTENTS),
    min_size=1,
    max_size=6,
)
# One for each thing that published templates lean on.
TEMPLATES = {
    "loop variables": "{% for m in messages %}{{ loop.index0 }}{{ m.role }}{% if loop.last %}!{% endif %}{% endfor %}",
    "special tokens": "{{ bos_token }}{{ eos_token }}{{ pad_token }}[{{ unk_token }}]{{ unk_token is defined }}",
    "trimmed blocks": "{% for m in messages %}\n  {% if m.role %}\n {{ m.content }}\n  {% endif %}\n{% endfor %}\n",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "loop controls": "{% for m in messages %}{% if loop.index == 3 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "tojson": "{{ messages | tojson(indent=2) }}{{ messages | tojson }}{{ {'b': 1, 'a': 2} | tojson(sort_keys=true) }}",
    "generation tag": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "no tools": "{{ tools is none }}{{ documents is none }}{{ custom is defined }}{{ add_generation_prompt }}",
    "slices and filters": "{{ messages[0]['content'] | trim | upper }}{{ messages[1:] | length }}",
    "macro": "{% macro turn(m) %}[{{ m.role }}]{% endmacro %}{% for m in messages %}{{ turn(m) }}{% endfor %}",
    "date": "{{ strftime_now('%%') }}",
}


def render(source: str, *contents: str) -> str:
    """The text that a template makes of these user messages."""
    return ChatTemplate(source, "the place", SPECIAL).render([ChatMessage("user", text) for text in contents or ["hi"]])


def as_dicts(messages: list[ChatMessage]) -> list[dict[str, str]]:
    """Messages as transformers takes them."""
    return [{"role": message.role, "content": message.content} for message in messages]


@settings(max_examples=30, deadline=None)
@given(messages=MESSAGES)
def test_the_tokens_of_a_conversation_equal_those_of_transformers(messages: list[ChatMessage]) -> None:
    expected = HF.apply_chat_template(as_dicts(messages), add_generation_prompt=True, return_dict=False)
    assert TOKENIZER.render_chat(messages) == expected


@pytest.mark.parametrize("template", TEMPLATES)
@settings(max_examples=20, deadline=None)
@given(messages=MESSAGES)
def test_any_template_renders_as_in_transformers(template: str, messages: list[ChatMessage]) -> None:
    expected = HF.apply_chat_template(
        as_dicts(messages), chat_template=TEMPLATES[template], add_generation_prompt=True, tokenize=False
    )
    assert ChatTemplate(TEMPLATES[template], "the place", SPECIAL).render(messages) == expected


def test_the_embedded_template_makes_the_format_of_deepseek_v2() -> None:
    messages = [ChatMessage("system", "Be brief."), ChatMessage("user", "Hi"), ChatMessage("assistant", "Hello")]
    messages.append(ChatMessage("user", "Bye"))
    ids = TOKENIZER.render_chat(messages)
    text = "Be brief.\n\nUser: Hi\n\nAssistant: HelloUser: Bye\n\nAssistant:"
    assert TOKENIZER.decode(ids) == text
    assert (ids[0], ids.count(0), ids.count(1)) == (0, 1, 1)


def test_what_a_template_refuses_is_the_clients_to_change() -> None:
    source = "{% if messages[0].content == 'bad' %}{{ raise_exception('roles must alternate') }}{% endif %}fine"
    assert render(source, "good") == "fine"
    with pytest.raises(InvalidRequestError, match=r"template refuses these messages: roles must alternate$"):
        render(source, "bad")


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].content.__class__.__mro__[1].__subclasses__() }}",
        "{{ lipsum.__globals__['os'].popen('id').read() }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ strftime_now.__code__ }}{{ strftime_now.__code__.co_code }}",
        "{{ ''.format.__self__.__class__.__base__ }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='system') }}",
        "{{ messages[0].pop('role') }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
    ],
)
def test_a_template_does_not_leave_its_sandbox(source: str) -> None:
    with pytest.raises(CheckpointError, match=r"^the place: the chat template failed: "):
        render(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[5].content }}",
        "{{ messages[0].name.first }}",
        "{{ 1 + messages[0].content }}",
        "{{ 1 // 0 * (messages | length) }}",
        "{{ messages[0].content.index('x') }}",
        "{{ '%d' | format(messages[0].content) }}",
        "{{ raise_exception() }}",
        "{{ strftime_now(1) }}",
        "{{ namespace() | tojson }}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
        "{{ messages[0].content * 2**61 }}",
    ],
)
def test_a_template_that_fails_is_the_operators_to_mend(source: str) -> None:
    with pytest.raises(CheckpointError, match=r"^the place: the chat template failed: "):
        render(source)


@pytest.mark.parametrize(
    ("source", "rule"),
    [
        ("a\nb {% if %}", "the place, line 2 of the template: "),
        ("{{ messages", "the place, line 1 of the template: "),
        ("\n\n{% for m in messages %}", "the place, line 3 of the template: "),
        ("{{ x | nofilter }}", "the place, line 1 of the template: No filter named 'nofilter'."),
        ("{% generation %}", "the place, line 1 of the template: "),
        ("{% break %}", "the place: the chat template cannot be compiled: 'break' outside loop"),
        ("{% for i in [1] %}" * 25 + "{% endfor %}" * 25, "the place: the chat template cannot be compiled: "),
        ("{{" + "(" * 5000 + "1" + ")" * 5000 + "}}", "the place: the chat template cannot be compiled: "),
        ("{{ 1" + "0" * 5000 + " }}", "the place: the chat template cannot be compiled: "),
    ],
)
def test_a_template_that_is_not_valid_is_refused_when_it_is_read(source: str, rule: str) -> None:
    with pytest.raises(CheckpointError) as refused:
        ChatTemplate(source, "the place", SPECIAL)
    assert str(refused.value).startswith(rule)
