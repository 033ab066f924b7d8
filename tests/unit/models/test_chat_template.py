"""Chat templates against transformers' apply_chat_template, and what a hostile one cannot do."""

from __future__ import annotations

import json

import pytest
import tokenizers
from tokenizers import models

from mxn.errors import UserError
from mxn.models.tokenizer import Tokenizer

CHATML = """{%- for m in messages %}
    {{- '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""
LLAMA = """{{ bos_token }}{% for m in messages %}
{% if m.role == 'user' %}
[INST] {{ m.content | trim }} [/INST]
{% elif m.role == 'assistant' %}
{% generation %}
 {{ m.content }}{{ eos_token }}
{% endgeneration %}
{% else %}
{{ raise_exception('unknown role ' ~ m.role) }}
{% endif %}
{% endfor %}"""
RICH = """{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}
{% if loop.index > 3 %}{% break %}{% endif %}
{{ {'r': m.role, 'x': '<é>'} | tojson }}{{ m.get('name', '-') }}{{ m.content }}{% endfor %}
{{ ns.n }}{{ tools | tojson(indent=2) }}
{{ enable_thinking if enable_thinking is defined else 'unset' }}{{ documents }}"""

CHATS = {
    "one": [{"role": "user", "content": 'hi <b>&</b> "quoted" é'}],
    "three": [
        {"role": "user", "content": "  a "},
        {"role": "assistant", "content": "b", "tool_calls": None},
        {"role": "user", "content": "c"},
    ],
    "reasoned": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "reasoning": "because"},
    ],
}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"x": {"type": "int"}}}}]


def save(folder, config, files=()):
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    raw = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    raw.save(str(folder / "tokenizer.json"))
    base = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(base | config))
    for name, text in dict(files).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


def both(folder):
    from transformers import AutoTokenizer

    return Tokenizer.load(folder), AutoTokenizer.from_pretrained(str(folder))


@pytest.mark.parametrize("template", [CHATML, LLAMA, RICH], ids=["chatml", "llama", "rich"])
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"add_generation_prompt": True},
        {"continue_final_message": True},
        {"tools": TOOLS, "enable_thinking": False},
        {"documents": [{"title": "t", "text": "x"}], "bos_token": "<other>"},
    ],
    ids=str,
)
def test_rendered_text_equals_transformers(tmp_path, template, chat, options):
    ours, theirs = both(save(tmp_path, {"chat_template": template}))
    try:
        want = theirs.apply_chat_template(CHATS[chat], tokenize=False, **options)
    except ValueError:  # such as a final message that the template does not keep
        with pytest.raises(UserError):
            ours.apply_chat_template(CHATS[chat], **options)
        return
    assert ours.apply_chat_template(CHATS[chat], **options) == want


def test_messages_are_not_changed(tmp_path):
    ours = Tokenizer.load(save(tmp_path, {"chat_template": CHATML}))
    chat = [{"role": "assistant", "content": "b"}]
    ours.apply_chat_template(chat, continue_final_message=True)
    assert chat == [{"role": "assistant", "content": "b"}]


def test_template_that_repeats_the_final_message_shows_no_mark(tmp_path):
    template = "{{ messages[-1].content }} again: {{ messages[-1].content }}"
    ours = Tokenizer.load(save(tmp_path, {"chat_template": template}))
    text = ours.apply_chat_template(CHATS["one"][:1], continue_final_message=True)
    content = CHATS["one"][0]["content"]
    assert text == f"{content} again: {content}"


def test_token_ids_on_request(tmp_path):
    ours, theirs = both(save(tmp_path, {"chat_template": "<s> x </s>"}))
    want = theirs.apply_chat_template(CHATS["one"], return_dict=False)
    assert ours.apply_chat_template(CHATS["one"], tokenize=True) == want


NAMED = [
    {"name": "default", "template": "default {{ messages[0].content }}"},
    {"name": "tool_use", "template": "tools {{ tools | length }}"},
]


@pytest.mark.parametrize(
    ("config", "files"),
    [
        ({"chat_template": NAMED}, {}),
        ({}, {"chat_template.jinja": "file {{ messages[0].content }}\n"}),
        ({"chat_template": "inline"}, {"chat_template.jinja": "file wins"}),
        (
            {},
            {
                "chat_template.jinja": "default",
                "additional_chat_templates/tool_use.jinja": "tool file",
            },
        ),
    ],
)
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_templates_are_found_where_transformers_finds_them(tmp_path, config, files, tools):
    ours, theirs = both(save(tmp_path, config, files))
    want = theirs.apply_chat_template(CHATS["one"], tools=tools, tokenize=False)
    assert ours.apply_chat_template(CHATS["one"], tools=tools) == want


def test_no_template_is_a_clear_error(tmp_path):
    ours = Tokenizer.load(save(tmp_path, {}))
    assert not ours.has_chat_template
    with pytest.raises(UserError, match="no chat template"):
        ours.apply_chat_template(CHATS["one"])


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no') }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% set x = namespace(__class__=1) %}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ messages[0].content + 1 }}",
        "{{ 1 / 0 }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{% include 'x' %}",
        "{{ unknown_function() }}",
        "{% broken",
    ],
)
def test_bad_or_hostile_templates_are_user_errors(tmp_path, template):
    ours = Tokenizer.load(save(tmp_path, {"chat_template": template}))
    with pytest.raises(UserError):
        ours.apply_chat_template(CHATS["one"])


def test_a_turn_that_only_calls_tools_passes_a_template_that_reads_every_text(tmp_path):
    template = (
        "{% for m in messages %}{% if 'x' in m.content %}!{% endif %}{{ m.content }}{% endfor %}"
    )
    ours = Tokenizer.load(save(tmp_path, {"chat_template": template}))
    assert ours.apply_chat_template([{"role": "assistant", "tool_calls": []}]) == ""


def test_a_turn_without_text_is_shown_as_it_is_where_the_template_takes_it(tmp_path):
    template = "{% for m in messages %}{{ 'text' if m.content is defined else 'none' }}{% endfor %}"
    ours = Tokenizer.load(save(tmp_path, {"chat_template": template}))
    assert ours.apply_chat_template([{"role": "assistant", "content": None}]) == "none"


def test_empty_conversation_and_contradiction_are_refused(tmp_path):
    ours = Tokenizer.load(save(tmp_path, {"chat_template": CHATML}))
    with pytest.raises(UserError, match="empty"):
        ours.apply_chat_template([])
    with pytest.raises(UserError, match="exclude each other"):
        ours.apply_chat_template(
            CHATS["three"], add_generation_prompt=True, continue_final_message=True
        )
