"""Facts kept beside a tokenizer are those that counting gives, and only of that very tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import mxn
from mxn.models import tokenizer_facts
from mxn.models.tokenizer import Tokenizer
from mxn.models.tokenizer_facts import Facts

SHIPPED = Path(mxn.__file__).parent / "shipped" / "mxn-shakespeare-llama"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(SHIPPED / name, tmp_path / name)
    return tmp_path


def test_what_is_kept_is_what_was_counted(folder: Path) -> None:
    counted = Tokenizer.load(folder)
    tokenizer_facts.write(folder, counted.facts)
    assert tokenizer_facts.read(folder) == counted.facts
    assert counted.facts.vocab_size == max(counted.vocab().values()) + 1
    assert Tokenizer.load(folder).min_tokens("x" * 1000) == counted.min_tokens("x" * 1000) > 0


def test_kept_facts_are_used(folder: Path) -> None:
    tokenizer_facts.write(folder, Facts(7, None))
    kept = Tokenizer.load(folder)
    assert kept.vocab_size == 7
    assert kept.min_tokens("x" * 1000) == 0


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_facts_of_another_tokenizer_do_not_count(folder: Path, name: str) -> None:
    tokenizer_facts.write(folder, Facts(7, None))
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(content | {"changed": True}))
    assert tokenizer_facts.read(folder) is None
    assert Tokenizer.load(SHIPPED).vocab_size > 7


@pytest.mark.parametrize("text", ["", "[]", '{"of": 1}', "{"])
def test_a_broken_file_does_not_count(folder: Path, text: str) -> None:
    (folder / tokenizer_facts.FILE).write_text(text)
    assert tokenizer_facts.read(folder) is None
