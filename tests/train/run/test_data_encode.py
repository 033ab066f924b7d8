"""Which tokens are learned: seen as text, for templates of several makers' kinds."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from mxn.errors import ConfigError, UserError
from mxn.models.tokenizer import Tokenizer
from mxn.train.run.data.documents import (
    BadLineError,
    Chat,
    Completion,
    Place,
    Text,
    parse_line,
)
from mxn.train.run.data.encode import Encoder, check_vocabulary, tokenizer_fingerprint
from support.training import LLAMA

PLACE = Place("a.jsonl", 1)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Its prompt opens a thought that the answer does not repeat.
THINKING = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
# Earlier answers lose their thoughts, as several makers' templates have it.
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content if loop.last else m.content.split('|')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Llama 2's kind: no header for the assistant, a space that belongs to both turns.
INST = (
    "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
# Phi's kind: the end of the text behind whatever comes last.
ENDING = CHATML.replace("{% endif %}", "{% else %}{{ eos_token }}{% endif %}")
# GLM's kind: a turn ends where the next speaker is named.
ENDLESS = (
    "{% for m in messages %}{{ '<|im_start|>' if m.role == 'user' else '<|im_end|>' }}"
    "\n{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|im_end|>{% endif %}"
)
TALK = (
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "hi there"},
    {"role": "user", "content": "and?"},
    {"role": "assistant", "content": "thought|bye"},
)


def make_tokenizer(
    template: str | None = CHATML, *, bos: bool = False, extra: Sequence[str] = ()
) -> Tokenizer:
    """Every byte is a token; the marks of the templates are special."""
    raw = tokenizers.Tokenizer(tokenizers.models.BPE(_byte_vocab(), []))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = tokenizers.decoders.ByteLevel()
    raw.add_special_tokens(["<|im_start|>", "<|im_end|>", "<s>", "</s>"])
    raw.add_tokens(list(extra))
    if bos:
        raw.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", raw.token_to_id("<s>"))]
        )
    config = {"bos_token": "<s>", "eos_token": "</s>"}
    if template:
        config["chat_template"] = template
    return Tokenizer.from_tokenizers(raw, config=config)


def _byte_vocab() -> dict[str, int]:
    return {c: i for i, c in enumerate(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))}


def learned(tokenizer: Tokenizer, document, **options) -> list[list[str]]:
    """Return the runs of text that are learned, for each sequence."""
    encoder = Encoder(tokenizer, tokenizer.vocab_size, **options)
    found = []
    for encoded in encoder.encode(document):
        runs, open_ = [], []
        for token, is_target in [*zip(encoded.ids, encoded.targets, strict=True), (0, False)]:
            if is_target:
                open_.append(token)
            elif open_:
                runs.append(tokenizer.decode(open_, skip_special_tokens=False))
                open_ = []
        found.append(runs)
    return found


def chat(*messages, **options) -> Chat:
    return Chat(messages or TALK, None, PLACE, **options)


def test_of_a_chat_the_answers_are_learned_with_their_end():
    assert learned(make_tokenizer(), chat()) == [["hi there<|im_end|>", "thought|bye<|im_end|>"]]


def test_a_prompt_that_opens_a_thought_hides_only_what_the_answer_repeats():
    got = learned(make_tokenizer(THINKING), chat())
    assert got == [["hi there<|im_end|>", "thought|bye<|im_end|>"]]


def test_a_template_that_rewrites_earlier_turns_gives_each_answer_its_own_sequence():
    talk = (*TALK[:2], {"role": "assistant", "content": "idea|hi"}, *TALK[3:])
    tokenizer = make_tokenizer(FORGETFUL)
    assert learned(tokenizer, chat(*talk)) == [
        ["idea|hi<|im_end|>"],
        ["thought|bye<|im_end|>"],
    ]
    second = Encoder(tokenizer, tokenizer.vocab_size).encode(chat(*talk))[1]
    assert "idea" not in tokenizer.decode(second.ids)


def test_a_template_without_headers_works_too():
    assert learned(make_tokenizer(INST), chat(*TALK[1:])) == [[" hi there</s>", " thought|bye</s>"]]


def test_a_template_that_ends_each_rendering_is_one_sequence():
    assert learned(make_tokenizer(ENDING), chat()) == [
        ["hi there<|im_end|>", "thought|bye<|im_end|>\n</s>"]
    ]


def test_without_an_end_of_turn_the_next_speaker_or_the_end_of_text_stops_the_model():
    assert learned(make_tokenizer(ENDLESS), chat(*TALK[1:])) == [
        ["\nhi there<|im_start|>", "\nthought|bye</s>"]
    ]


def test_an_answer_that_begins_unlike_the_opened_thought_is_learned_from_its_first_token():
    call = {"role": "assistant", "content": "<tool>x"}
    tokenizer = make_tokenizer(THINKING, extra=["<think>", "<tool>"])
    assert learned(tokenizer, chat(TALK[1], call)) == [["<tool>x<|im_end|>"]]
    thought = {"role": "assistant", "content": "<think>\nso</think>x"}
    assert learned(tokenizer, chat(TALK[1], thought)) == [["so</think>x<|im_end|>"]]


class _Slow:
    """The same tokenizer behind an interface that does not tell where tokens stand."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self.raw = tokenizer, None

    def __getattr__(self, name: str):
        return getattr(self._tokenizer, name)


@pytest.mark.parametrize("template", [CHATML, INST, ENDING, ENDLESS, FORGETFUL])
def test_a_tokenizer_that_hides_places_gives_the_same(template):
    tokenizer = make_tokenizer(template)
    slow = _Slow(tokenizer)
    for document in (chat(*TALK[1:]), Completion("a", "b", PLACE), Text("c", PLACE)):
        assert learned(slow, document) == learned(tokenizer, document)


def test_the_shipped_model_learns_its_role():
    tokenizer = Tokenizer.load(LLAMA)
    got = learned(tokenizer, chat(*TALK[1:3]))
    assert got == [["hi there<|eos|>"]]


def test_turns_of_weight_zero_and_turns_of_the_prompt_are_not_learned():
    quiet = (*TALK[:2], {**TALK[2], "weight": 0}, *TALK[3:])
    assert learned(make_tokenizer(), chat(*quiet)) == [["thought|bye<|im_end|>"]]
    assert learned(make_tokenizer(), chat(first_target=3)) == [["thought|bye<|im_end|>"]]
    with pytest.raises(BadLineError, match="nothing to learn"):
        learned(make_tokenizer(), chat(*TALK[:2], {**TALK[2], "weight": 0}))


def test_all_can_be_learned_instead():
    (runs,) = learned(make_tokenizer(), chat(*TALK[1:3]), learn="all")
    assert runs == [
        "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nhi there<|im_end|>\n"
    ]


@pytest.mark.parametrize("bos", [False, True])
def test_of_a_completion_what_follows_the_prompt_is_learned(bos):
    tokenizer = make_tokenizer(None, bos=bos)
    assert learned(tokenizer, Completion("ask: ", "äns", PLACE)) == [["äns</s>"]]
    (encoded,) = Encoder(tokenizer, tokenizer.vocab_size).encode(Completion("a", "b", PLACE))
    assert tokenizer.decode(encoded.ids, False) == ("<s>" if bos else "") + "ab</s>"


def test_text_is_learned_whole_and_ends():
    assert learned(make_tokenizer(None), Text("abc", PLACE)) == [["abc</s>"]]
    assert learned(make_tokenizer(None), Text("abc</s>", PLACE)) == [["abc</s>"]]


def test_a_chat_needs_a_template_and_one_that_accepts_it():
    with pytest.raises(UserError, match="no chat template"):
        learned(make_tokenizer(None), chat())
    refusing = "{{ raise_exception('roles must alternate\nand more') }}"
    with pytest.raises(BadLineError, match=r"refused by the chat template: roles must alternate$"):
        learned(make_tokenizer(refusing), chat())


def test_a_tokenizer_larger_than_the_model_is_refused():
    tokenizer = make_tokenizer()
    with pytest.raises(ConfigError, match=r"has 260 tokens, the model 200: 56 of them"):
        Encoder(tokenizer, 200)
    check_vocabulary(tokenizer, 256)  # the four marks were added: tolerated until one is used
    encoder = Encoder(tokenizer, 256)
    with pytest.raises(BadLineError, match=r"has token 25\d, the model's vocabulary ends at 255"):
        encoder.encode(chat())
    with pytest.raises(ConfigError, match="neither"):
        Encoder(tokenizer, 300, learn="some")


def test_documents_together_become_what_each_becomes_alone():
    tokenizer = make_tokenizer(bos=True)
    encoder = Encoder(tokenizer, tokenizer.vocab_size)
    documents = [
        Text("a", PLACE),
        chat(),
        Text("\u00e9t\u00e9", PLACE),
        Completion("b", "c", PLACE),
    ]
    got = [sequences for _, sequences in encoder.encode_all(documents)]
    assert got == [encoder.encode(document) for document in documents]
    mute = chat(TALK[1], {**TALK[2], "weight": 0})
    pairs = list(encoder.encode_all([Text("a", PLACE), mute, Text("b", PLACE)]))
    assert [type(result) for _, result in pairs] == [list, BadLineError, list]
    assert tokenizer.decode(pairs[2][1][0].ids) == "b"


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "x"]), "content": JSON_VALUES}
    ),
    max_size=4,
)


@settings(max_examples=150, deadline=None)
@given(
    line=st.fixed_dictionaries(
        {},
        optional={
            "text": JSON_VALUES,
            "messages": MESSAGES | JSON_VALUES,
            "prompt": MESSAGES | JSON_VALUES,
            "completion": MESSAGES | JSON_VALUES,
            "tools": JSON_VALUES,
        },
    ),
    template=st.sampled_from([CHATML, ENDLESS, INST]),
)
def test_whatever_a_line_holds_it_is_learned_or_refused(line, template):
    tokenizer = make_tokenizer(template)
    encoder = Encoder(tokenizer, tokenizer.vocab_size)
    try:
        sequences = encoder.encode(parse_line(json.dumps(line).encode(), PLACE))
    except BadLineError:
        return
    for encoded in sequences:
        assert len(encoded.ids) == len(encoded.targets)
        assert any(encoded.targets[1:])


def test_fingerprints_tell_tokenizers_apart():
    same = tokenizer_fingerprint(make_tokenizer())
    assert same == tokenizer_fingerprint(make_tokenizer())
    assert same != tokenizer_fingerprint(make_tokenizer(INST))
    assert same != tokenizer_fingerprint(make_tokenizer(bos=True))
