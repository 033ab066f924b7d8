"""Embeddings, rerank and score; tokenize and detokenize."""

from __future__ import annotations

import base64
import math
import struct
import threading

import pytest

from mxn.models.tokenizer import Tokenizer

IDS = [97, 98, 99]


def embed(api, value, **fields):
    return api.post("/v1/embeddings", {"model": "embed", "input": value} | fields)


@pytest.mark.parametrize(
    ("value", "count"), [("abc", 1), (["abc", "b"], 2), (IDS, 1), ([IDS, [98]], 2)]
)
def test_all_four_input_shapes(api, value, count):
    body = embed(api, value).json()
    assert body["object"] == "list"
    assert [row["index"] for row in body["data"]] == list(range(count))
    assert body["data"][0]["embedding"] == embed(api, "abc").json()["data"][0]["embedding"]
    assert body["usage"]["prompt_tokens"] == body["usage"]["total_tokens"] == 3 + count - 1


def test_base64_and_float_are_the_same_bits(api):
    floats = embed(api, ["abc", "é"], encoding_format="float").json()["data"]
    coded = embed(api, ["abc", "é"], encoding_format="base64").json()["data"]
    for one, other in zip(floats, coded, strict=True):
        assert struct.pack("<8f", *one["embedding"]) == base64.b64decode(other["embedding"])


def test_dimensions_shorten_and_normalize_again(api):
    full = embed(api, "abc").json()["data"][0]["embedding"]
    short = embed(api, "abc", dimensions=3).json()["data"][0]["embedding"]
    norm = math.sqrt(sum(value**2 for value in full[:3]))
    assert short == pytest.approx([value / norm for value in full[:3]], abs=1e-6)
    assert embed(api, "abc", dimensions=8).json()["data"][0]["embedding"] == full


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"dimensions": 9}, "dimensions"),
        ({"dimensions": 0}, "dimensions"),
        ({"encoding_format": "hex"}, "encoding_format"),
        ({"input": []}, "input"),
        ({"input": ""}, "input"),
        ({"input": ["a", ""]}, "input[1]"),
        ({"input": ["a", 3]}, "input"),
        ({"input": None}, "input"),
        ({"input": ["a"] * 2049}, "input"),
        ({"model": "echo"}, "model"),
        ({"model": "rank"}, "model"),
    ],
)
def test_bad_embedding_requests_name_the_field(api, fields, param):
    response = embed(api, "a", **fields)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_embedding_input_over_the_context_says_both_numbers(api):
    error = embed(api, ["a", "a" * 5000]).json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert (error["n_prompt_tokens"], error["n_ctx"]) == (5000, 4096)
    assert "5000" in error["message"]
    assert "4096" in error["message"]


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
def test_rerank_sorts_and_keeps_the_positions(api, path):
    documents = ["xyz", "abc", {"text": "ab"}]
    body = api.post(path, {"model": "rank", "query": "abc", "documents": documents}).json()
    assert [result["index"] for result in body["results"]] == [1, 2, 0]
    scores = [result["relevance_score"] for result in body["results"]]
    sigmoids = [1 / (1 + math.exp(-logit)) for logit in (1, 0, -2)]
    assert scores == pytest.approx(sigmoids, rel=1e-6), "the sigmoid of the logit"
    assert body["results"][1]["document"] == {"text": "ab"}
    assert body["usage"]["total_tokens"] == 3 * 3 + 3 + 3 + 2


def test_top_n_and_documents_are_optional(api):
    base = {"model": "rank", "query": "abc", "documents": ["xyz", "abc", "ab"]}
    top = api.post("/rerank", base | {"top_n": 1, "return_documents": False}).json()
    assert [(r["index"], "document" in r) for r in top["results"]] == [(1, False)]
    assert len(api.post("/rerank", base | {"top_n": 0}).json()["results"]) == 3
    assert len(api.post("/rerank", base | {"top_n": 99}).json()["results"]) == 3


def test_documents_are_cut_only_on_request(api):
    base = {"model": "rank", "query": "z", "documents": ["aaz"]}
    whole = api.post("/rerank", base).json()["results"][0]["relevance_score"]
    cut = api.post("/rerank", base | {"max_tokens_per_doc": 2}).json()
    assert cut["results"][0]["relevance_score"] < whole
    assert cut["usage"]["prompt_tokens"] == 3


@pytest.mark.parametrize(
    "fields",
    [
        {"query": None},
        {"query": ["a"]},
        {"documents": []},
        {"documents": "abc"},
        {"documents": [{"body": "a"}]},
        {"top_n": -1},
        {"documents": ["a"] * 2049},
        {"documents": ["a" * 5000]},
        {"instruction": "be good"},
        {"model": "echo"},
    ],
)
def test_bad_rerank_requests_are_refused(api, fields):
    body = {"model": "rank", "query": "a", "documents": ["a"]} | fields
    response = api.post("/rerank", body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] is not None


@pytest.mark.parametrize("path", ["/score", "/v1/score"])
@pytest.mark.parametrize("names", [("text_1", "text_2"), ("queries", "documents")])
def test_score_pairs_one_to_many_and_one_to_one(api, path, names):
    one, many = names

    def scores(first, second):
        body = api.post(path, {"model": "rank", one: first, many: second}).json()
        assert [row["object"] for row in body["data"]] == ["score"] * len(body["data"])
        return [row["score"] for row in body["data"]]

    assert scores("abc", ["abc", "xyz"]) == scores(["abc", "abc"], ["abc", "xyz"])
    assert scores("abc", "abc") == scores(["abc"], ["abc"])


@pytest.mark.parametrize(
    "fields",
    [{}, {"text_1": "a"}, {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, {"text_1": 3},
     {"text_1": [], "text_2": []}],
)  # fmt: skip
def test_bad_score_requests_are_refused(api, fields):
    response = api.post("/score", {"model": "rank"} | fields)
    assert response.status_code == 400
    assert response.json()["error"]["param"] is not None


def test_embedder_scores_by_cosine(api):
    body = api.post("/score", {"model": "embed", "text_1": "abc", "text_2": ["abc", "x"]}).json()
    vectors = [row["embedding"] for row in embed(api, ["abc", "x"]).json()["data"]]
    cosine = sum(a * b for a, b in zip(*vectors, strict=True))
    assert [row["score"] for row in body["data"]] == pytest.approx([1.0, cosine], abs=1e-6)


def test_tokenize_and_detokenize_are_inverse(api):
    text = "naïve 日本 <|end|>"
    body = api.post(
        "/tokenize", {"model": "echo", "prompt": text, "return_token_strs": True}
    ).json()
    assert body["count"] == len(body["tokens"]) == len(body["token_strs"])
    assert body["max_model_len"] == 4096
    back = api.post("/detokenize", {"model": "echo", "tokens": body["tokens"]}).json()
    assert back == {"prompt": text}


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("truncate", "/rerank", {"query": "q", "documents": ["a b"], "max_tokens_per_doc": 1}),
        ("decode", "/detokenize", {"tokens": [97, 98]}),
        ("token_text", "/tokenize", {"prompt": "ab", "return_token_strs": True}),
    ],
)
def test_work_as_long_as_the_body_is_not_done_in_the_event_loop(
    api, monkeypatch, method, path, body
):
    seen = []
    original = getattr(Tokenizer, method)

    def spy(self, *args):
        seen.append(threading.current_thread() is threading.main_thread())
        return original(self, *args)

    monkeypatch.setattr(Tokenizer, method, spy)
    model = "rank" if path == "/rerank" else "echo"
    assert api.post(path, {"model": model} | body).status_code == 200
    assert seen
    assert not any(seen)


def test_tokenize_of_a_chat_is_what_the_replica_gets(api):
    messages = [{"role": "user", "content": "hi"}]
    body = api.post("/tokenize", {"model": "echo", "messages": messages}).json()
    api.chat("hi", max_tokens=1)
    assert body["tokens"] == api.engine.seen[0].prompt_ids
    assert body["token_strs"] is None


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "b"}]}),
        ("/tokenize", {"prompt": 3}),
        ("/detokenize", {"tokens": ["a"]}),
        ("/detokenize", {"tokens": [99999]}),
        ("/detokenize", {}),
    ],
)
def test_bad_tokenize_requests_are_refused(api, path, fields):
    response = api.post(path, {"model": "echo"} | fields)
    assert response.status_code == 400
    assert response.json()["error"]["param"] is not None
