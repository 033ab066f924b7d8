"""Random bodies never make a 5xx, and nothing they start stays behind."""

from __future__ import annotations

import asyncio

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mxn.serve.openai.types import ChatRequest, CompletionRequest, EmbeddingRequest
from mxn.serve.rerank import RerankRequest, ScoreRequest
from mxn.serve.tokenize import DetokenizeRequest, TokenizeRequest

ROUTES = {
    "/v1/chat/completions": ("echo", ChatRequest),
    "/v1/completions": ("echo", CompletionRequest),
    "/v1/embeddings": ("embed", EmbeddingRequest),
    "/v1/rerank": ("rank", RerankRequest),
    "/v1/score": ("rank", ScoreRequest),
    "/tokenize": ("echo", TokenizeRequest),
    "/detokenize": ("echo", DetokenizeRequest),
}
FIELDS = sorted({name for _, type in ROUTES.values() for name in type.__struct_fields__})

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 40),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=12),
    st.sampled_from(["user", "assistant", "text", "none", "auto", "float", "base64"]),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.sampled_from([*FIELDS, "role", "content", "text", "type"]), inner),
    ),
    max_leaves=8,
)
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "system", "tool", "x"]), "content": values}
    ),
    max_size=3,
)
bodies = st.dictionaries(st.sampled_from(FIELDS), values, max_size=6)


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(path=st.sampled_from(sorted(ROUTES)), body=bodies, chat=messages, small=st.booleans())
def test_random_bodies_are_answered_or_refused(api, path, body, chat, small):
    model, _ = ROUTES[path]
    start = {"model": model, "messages": chat, "prompt": "ab", "input": "ab", "query": "a"}
    start |= {"max_tokens": 3} if small else {}
    response = api.post(path, start | {k: v for k, v in body.items() if k != "model"})
    assert response.status_code in (200, 400), response.text
    if response.status_code == 400:
        assert {"message", "type", "param", "code"} <= set(response.json()["error"])
    stats = asyncio.run(api.engine.stats())
    assert (stats.num_running, stats.kv_pages_used) == (0, 0)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(path=st.sampled_from(sorted(ROUTES)), content=st.binary(max_size=200))
def test_random_bytes_are_refused(api, path, content):
    assert api.request("POST", path, content=content).status_code == 400
