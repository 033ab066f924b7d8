"""Byte-level BPE with two special tokens, and the chat template. Knows no network.

Every byte is in the alphabet, so any UTF-8 text is kept exactly. A run of line ends is a piece of
its own: the blank line between two speeches is then one token, and `<|eos|>` can stand in its
place.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

BOS, EOS = "<|bos|>", "<|eos|>"
_PIECES = r"\n+| ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|[^\S\n]+(?!\S)|\s"

# A role becomes a speaker of the training text. `name` of a message and `speaker` (for the answer)
# choose others: chat_template_kwargs={"speaker": "PETRUCHIO"}.
CHAT_TEMPLATE = """\
{%- set me = speaker | default('ROMEO') -%}
{%- set who = {'system': 'Chorus', 'developer': 'Chorus', 'user': 'JULIET', 'assistant': me} -%}
{{- bos_token -}}
{%- for message in messages -%}
{%- if message['role'] not in who -%}
{{- raise_exception('this model knows the roles system, developer, user and assistant, not '
    ~ message['role']) -}}
{%- endif -%}
{{- message['name'] | default(who[message['role']], true) ~ ':\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] | trim -}}
{%- else -%}
{%- for part in message['content'] | default([], true) if part['type'] == 'text' -%}
{{- part['text'] | trim -}}
{%- endfor -%}
{%- endif -%}
{{- eos_token -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- me ~ ':\\n' -}}{%- endif -%}
"""


def train_tokenizer(text: str, vocab_size: int) -> Tokenizer:
    """Return a tokenizer trained on `text`; ids 0 and 1 are `<|bos|>` and `<|eos|>`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, folder: Path, max_tokens: int) -> None:
    """Write tokenizer.json and tokenizer_config.json in Hugging Face layout."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_tokens,
        "chat_template": CHAT_TEMPLATE,
    }
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
