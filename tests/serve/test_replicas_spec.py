"""How replicas on other servers are named on a command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from mxn.errors import ConfigError
from mxn.serve.replicas.spec import ReplicaSpec


def test_a_plain_address_is_passed_through() -> None:
    spec = ReplicaSpec.parse("qwen=http://10.0.0.7:8000/v1")
    assert (spec.model, spec.url, spec.via) == ("qwen", "http://10.0.0.7:8000", "pass")
    assert (spec.upstream().model, spec.upstream().kind) == ("qwen", "openai")
    assert spec.upstream().max_output is None
    assert ReplicaSpec.parse("q=http://a,max_output=300").upstream().max_output == 300


def test_options_are_read_and_the_way_follows_from_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("UPSTREAM_KEY", "sk-up")
    spec = ReplicaSpec.parse(
        f"q=https://a.b,kind=vllm,as=Qwen/Qwen3,key=env:UPSTREAM_KEY,chip=c,tokenizer={tmp_path},"
        "context=4096"
    )
    assert spec.via == "tokens"
    config = spec.compat()
    assert (config.model, config.key, config.chip, config.max_context) == (
        "Qwen/Qwen3", "sk-up", "c", 4096,
    )  # fmt: skip
    assert ReplicaSpec.parse("q=http://a,kind=mxn").via == "replica"
    assert ReplicaSpec.parse("q=http://a,kind=mxn,via=pass").via == "pass"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("http://a:1", "expected MODEL=URL"),
        ("q=a:1", "no http address"),
        ("q=http://a,chp=x", "did you mean chip"),
        ("q=http://a,chip=", "empty option"),
        ("q=http://a,kind=tgi", "'tgi' is not one of openai, vllm"),
        ("q=http://a,context=0", "number of tokens"),
        ("q=http://a,max_output=-1", "max_output is a number of tokens"),
        ("q=http://a,max_output=9999999999", "max_output is a number of tokens"),
        ("q=http://a,via=tokens", "needs the model's tokenizer"),
        ("q=http://a,kind=vllm,via=replica", "only an mxn server"),
        ("q=http://a,key=sk-secret", "named, not shown"),
        ("q=http://a,key=env:NOT_THERE_AT_ALL", "not there or empty"),
    ],
)
def test_mistakes_say_what_is_wrong(text: str, what: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ReplicaSpec.parse(text)
    assert what in str(caught.value)
    assert "sk-secret" not in str(caught.value)
