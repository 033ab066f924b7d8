"""What a tenant is charged and refused, seen from outside: one row, with the counts of the answer.

Every test has a tenant of its own. Its key is made at its first request, after its limits: a key
that a gateway does not know is looked for at once, other changes are seen within a second.
"""

from __future__ import annotations

import itertools
import json
import time

import httpx
import pytest
from sqlalchemy import select

from mxn.engine.echo import EchoEngine
from mxn.ledger import keys, schema
from mxn.ledger.database import Database
from mxn.ledger.moments import now_us
from mxn.serve.accounting import Accounting
from mxn.serve.app import create_app
from mxn.serve.flat import CODES
from mxn.serve.fleet import Replica
from mxn.serve.pooled import PooledClient
from mxn.serve.served import ServedModel, ServedModels
from mxn.serve.server import running
from mxn.serve.settings import ServeSettings
from support.ledgers import make_tenant, period_of

INPUT, CACHED, OUTPUT = 3_000_000, 1_000_000, 7_000_000  # micro for a million tokens
MAX_BODY = 20_000
CHAT = {
    "model": "echo", "messages": [{"role": "user", "content": "hello there, you"}],
    "max_tokens": 5, "temperature": 0,
}  # fmt: skip
WITH_USAGE = {"stream": True, "stream_options": {"include_usage": True}}
COMPLETION = {"model": "echo", "prompt": "hello there", "max_tokens": 5, "temperature": 0}
RESPONSE = {"model": "echo", "input": "hello there, you", "max_output_tokens": 16}
EMBEDDING = {"model": "embed", "input": ["hello", "there"]}
RERANK = {"model": "rank", "query": "hello", "documents": ["hello you", "nobody"]}
SCORE = {"model": "rank", "text_1": "hello", "text_2": ["hello you", "nobody"]}
ON_CHIP = "/maas/echo/echo/chat/completions"

WHOLE = [
    ("/v1/chat/completions", CHAT),
    ("/v1/chat/completions", CHAT | {"n": 2}),
    ("/v1/completions", COMPLETION),
    ("/v1/completions", COMPLETION | {"prompt": ["hello there", "you"]}),
    ("/v1/responses", RESPONSE),
    ("/v1/messages", CHAT),
    ("/v1/embeddings", EMBEDDING),
    ("/v1/rerank", RERANK),
    ("/v1/score", SCORE),
    ("/maas/v1/chat/completions", CHAT),
    ("/maas/v1/embeddings", EMBEDDING),
    ("/maas/v1/rerank", RERANK),
    (ON_CHIP, CHAT),
]
STREAMS = [
    ("/v1/chat/completions", CHAT | WITH_USAGE),
    ("/v1/chat/completions", CHAT | WITH_USAGE | {"n": 2}),
    ("/v1/completions", COMPLETION | WITH_USAGE),
    ("/v1/responses", RESPONSE | {"stream": True}),
    ("/v1/messages", CHAT | {"stream": True}),
    (ON_CHIP, CHAT | WITH_USAGE),
]
PATHS = ["/v1/chat/completions", "/v1/messages", ON_CHIP]  # OpenAI's errors, Anthropic's, flat ones

_numbers = itertools.count()


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    opened = Database.open(f"sqlite:///{tmp_path_factory.mktemp('metering')}/ledger.db")
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def url(database):
    def served(name, kind):
        engine = EchoEngine(kind=kind)
        pool = PooledClient([Replica(id=name, client=engine, chip="echo")])
        return ServedModel(name=name, client=pool, tokenizer=engine.tokenizer)

    kinds = {"echo": "decoder", "embed": "embedder", "rank": "reranker"}
    models = ServedModels([served(name, kind) for name, kind in kinds.items()])
    prices = make_tenant(database)
    for kind, micro in {"input": INPUT, "cached": CACHED, "output": OUTPUT}.items():
        prices.price(kind, micro)
    settings = ServeSettings(max_body_bytes=MAX_BODY)
    app = create_app(models, settings, accounting=Accounting(Database(str(database.url))))
    with running(app) as found:
        yield found


@pytest.fixture(scope="module")
def chat_tokens(database, url):
    """Return the input tokens of `CHAT`."""
    headers = {"authorization": f"Bearer {make_tenant(database, 'measuring').key}"}
    answer = httpx.post(f"{url}/v1/chat/completions", json=CHAT, headers=headers, timeout=20)
    return answer.json()["usage"]["prompt_tokens"]


@pytest.fixture
def tenant(database):
    return make_tenant(database, f"org-{next(_numbers)}")


class Client:
    """Asks with a key that is made for the first request, or with another one."""

    def __init__(self, url, tenant):
        self.url = url
        self.tenant = tenant
        self.key_id = self.key = None

    def __call__(self, path, body, key=None):
        return self.request("POST", path, key=key, json=body)

    def request(self, method, path, key=None, **options):
        if key is None and self.key is None:
            self.key_id, self.key = new_key(self.tenant)
        headers = {"authorization": f"Bearer {key or self.key}"}
        return httpx.request(method, self.url + path, headers=headers, timeout=20, **options)


def new_key(tenant, **options):
    with tenant.database.begin() as connection:
        return keys.create_key(
            connection, tenant.principal.project_id, name=f"k{next(_numbers)}", now_us=now_us(),
            **options,
        )  # fmt: skip


@pytest.fixture
def post(url, tenant):
    return Client(url, tenant)


def rows(tenant):
    table = schema.usage
    query = select(table).where(table.c.org_id == tenant.principal.org_id)
    with tenant.database.read() as connection:
        return list(connection.execute(query))


def usage_of(answer):
    """Return what an answer says it used, whole or in the events of its stream, and its id."""
    if not answer.headers["content-type"].startswith("text/event-stream"):
        parts = [answer.json()]
    else:
        lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: {")]
        parts = [json.loads(line) for line in lines]
    usage, found_id = {}, None
    for part in parts:
        inner = part.get("response") or part.get("message") or part
        usage |= inner.get("usage") or {}
        found_id = found_id or inner.get("id")
    assert usage, answer.text
    return usage, found_id


def counts_of(usage):
    """Return (input, cached, output, reasoning) of any protocol's `usage`."""
    if "cache_read_input_tokens" in usage:  # Anthropic counts cached tokens beside the others
        cached = usage["cache_read_input_tokens"]
        return usage["input_tokens"] + cached, cached, usage["output_tokens"], 0
    ours, theirs = ("input", "output") if "input_tokens" in usage else ("prompt", "completion")
    cached = (usage.get(f"{ours}_tokens_details") or {}).get("cached_tokens", 0)
    made = (usage.get(f"{theirs}_tokens_details") or {}).get("reasoning_tokens", 0)
    found = usage[f"{ours}_tokens"], cached, usage.get(f"{theirs}_tokens", 0), made
    assert usage["total_tokens"] == found[0] + found[2]
    return found


def check_row(row, path, body, answer):
    assert answer.status_code == 200, answer.text
    usage, answer_id = usage_of(answer)
    counts = counts_of(usage)
    found = row.input_tokens, row.cached_tokens, row.output_tokens, row.reasoning_tokens
    assert found == counts
    assert counts[0] > 0
    assert (counts[2] > 0) == (body["model"] == "echo")
    assert (row.state, row.reason, row.status) == ("settled", "complete", 200)
    assert (row.endpoint, row.model) == (path, body["model"])
    assert (row.chip, row.replica) == ("echo", body["model"])
    assert row.request_id == answer.headers["x-request-id"]
    assert row.is_stream is body.get("stream", False)
    fresh = counts[0] - counts[1]
    assert row.cost_micro == 3 * fresh + counts[1] + 7 * counts[2]
    if answer_id:  # embeddings have none
        assert row.id == answer_id


@pytest.mark.parametrize(("path", "body"), [*WHOLE, *STREAMS])
def test_an_answer_leaves_one_row_with_the_counts_it_shows(post, tenant, path, body):
    budget = tenant.budget(10_000_000, currency="USD")
    answer = post(path, body)
    (row,) = rows(tenant)
    check_row(row, path, body, answer)
    assert row.key_id == post.key_id
    assert period_of(tenant.database, budget) == (0, row.cost_micro)


def test_a_stream_that_shows_no_usage_is_counted_all_the_same(post, tenant):
    usage, _ = usage_of(post("/v1/chat/completions", CHAT))
    answer = post("/v1/chat/completions", CHAT | {"stream": True})
    assert "usage" not in answer.text
    whole, stream = rows(tenant)
    assert (whole.is_stream, stream.is_stream) == (False, True)
    assert stream.output_tokens == whole.output_tokens == usage["completion_tokens"]
    assert stream.cost_micro == whole.cost_micro


def test_what_costs_nothing_leaves_no_row(tenant, post):
    assert post("/tokenize", {"model": "echo", "prompt": "hello"}).status_code == 200
    assert post.request("GET", "/v1/models").status_code == 200
    assert post("/v1/chat/completions", CHAT | {"temperature": "hot"}).status_code == 400
    assert post("/v1/chat/completions", CHAT | {"model": "nobody"}).status_code == 404
    assert rows(tenant) == []


def check_shape(path, answer, *, code, type, anthropic):
    """Check that an error is said as clients of `path` expect it."""
    body = answer.json()
    if path.startswith("/maas/"):
        flat = CODES.get(code, 10009 if answer.status_code == 401 else 61000 + answer.status_code)
        assert set(body) == {"code", "msg"}
        assert body["code"] == flat
        assert body["msg"]
    elif path == "/v1/messages":
        assert (body["type"], body["error"]["type"]) == ("error", anthropic)
        assert body["error"]["message"]
        assert body["request_id"] == answer.headers["x-request-id"]
    else:
        assert set(body["error"]) == {"message", "type", "param", "code"}
        assert (body["error"]["code"], body["error"]["type"]) == (code, type)


@pytest.mark.parametrize("path", PATHS)
def test_a_key_without_the_scope_is_refused(post, tenant, path):
    _, key = new_key(tenant, scopes=("batch", "admin"))
    answer = post(path, CHAT, key)
    assert answer.status_code == 403
    check_shape(path, answer, code="permission_denied", type="permission_error",
                anthropic="permission_error")  # fmt: skip
    assert "inference" in answer.text
    assert rows(tenant) == []


@pytest.mark.parametrize(
    ("method", "path", "scope"),
    [
        ("GET", "/v1/files", "batch"),
        ("GET", "/v1/batches", "batch"),
        ("POST", "/v1/load_lora_adapter", "admin"),
        ("POST", "/replica/v1/generate", "replica"),
        ("POST", "/v1/embeddings", "inference"),
        ("GET", "/v1/models", "inference"),
    ],
)
def test_each_path_needs_its_scope(post, tenant, method, path, scope):
    _, without = new_key(tenant, scopes=[one for one in keys.SCOPES if one != scope])
    refused = post.request(method, path, key=without)
    assert refused.status_code == 403
    assert f"'{scope}'" in refused.json()["error"]["message"]
    _, with_it = new_key(tenant, scopes=[scope])
    assert post.request(method, path, key=with_it).status_code not in (401, 403)


@pytest.mark.parametrize("path", PATHS)
def test_a_revoked_key_is_refused_within_a_second(post, tenant, path):
    key_id, key = new_key(tenant)
    assert post(path, CHAT, key).status_code == 200
    with tenant.database.begin() as connection:
        assert keys.revoke_key(connection, key_id, now_us=now_us())
    revoked_s = time.monotonic()
    num_paid = 1
    while (answer := post(path, CHAT, key)).status_code == 200:
        num_paid += 1
        assert time.monotonic() - revoked_s < 3  # 1 s is promised; the machine may be slow
        time.sleep(0.05)
    assert answer.status_code == 401
    assert "invalid_token" in answer.headers["www-authenticate"]
    check_shape(path, answer, code="invalid_api_key", type="invalid_request_error",
                anthropic="authentication_error")  # fmt: skip
    assert len(rows(tenant)) == num_paid
    assert post(path, CHAT).status_code == 200, "the tenant's other key still holds"


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("currency", [None, "USD"])
def test_a_budget_without_room_is_no_case_for_a_retry(post, tenant, path, currency):
    budget = tenant.budget(10, currency=currency)
    answer = post(path, CHAT)
    assert answer.status_code == 429
    check_shape(path, answer, code="insufficient_quota", type="insufficient_quota",
                anthropic="rate_limit_error")  # fmt: skip
    assert answer.headers["x-should-retry"] == "false"
    assert "retry-after" not in answer.headers
    assert rows(tenant) == []
    assert period_of(tenant.database, budget) == (0, 0)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("kind", "header"),
    [("requests", "requests"), ("input_tokens", "tokens"), ("output_tokens", "output-tokens")],
)
def test_a_rate_limit_says_when_to_come_back(chat_tokens, post, tenant, path, kind, header):
    limits = {"requests": 1, "input_tokens": chat_tokens, "output_tokens": CHAT["max_tokens"]}
    limit = limits[kind]
    tenant.limit(kind, limit)
    left = limit if kind == "output_tokens" else 0  # output counts when it has been made
    stay_within_a_minute()
    within = post(path, CHAT)
    assert within.status_code == 200, within.text
    assert within.headers[f"x-ratelimit-limit-{header}"] == str(limit)
    assert within.headers[f"x-ratelimit-remaining-{header}"] == str(left)
    answer = post(path, CHAT)
    assert answer.status_code == 429
    check_shape(path, answer, code="rate_limit_exceeded", type="rate_limit_error",
                anthropic="rate_limit_error")  # fmt: skip
    assert 1 <= int(answer.headers["retry-after"]) <= 60
    assert 1 <= int(answer.headers["retry-after-ms"]) <= 60_000
    assert "x-should-retry" not in answer.headers
    assert len(rows(tenant)) == 1


def stay_within_a_minute():
    """Limits begin anew with each minute of the clock."""
    left_s = 60 - time.time() % 60
    if left_s < 2:
        time.sleep(left_s)


@pytest.mark.parametrize("path", [*PATHS, "/v1/embeddings", "/v1/responses"])
def test_a_body_that_is_too_large_leaves_no_row(post, tenant, path):
    answer = post(path, CHAT | {"user": "x" * MAX_BODY})
    assert answer.status_code == 413
    check_shape(path, answer, code="request_too_large", type="invalid_request_error",
                anthropic="request_too_large")  # fmt: skip
    assert rows(tenant) == []
    # The limit is of the body, not of the tenant.
    assert post("/v1/chat/completions", CHAT).status_code == 200
    assert len(rows(tenant)) == 1
