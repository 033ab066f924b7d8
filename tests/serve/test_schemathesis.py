"""Requests made from our own OpenAPI document: no 5xx, and answers are as the document says.

A taste of the whole run, which `python tools/judges/run.py schemathesis` makes over a socket.
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, given, settings

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")


CHECKS = [
    schemathesis.checks.not_a_server_error,
    schemathesis.checks.content_type_conformance,
    schemathesis.checks.response_schema_conformance,
]


def test_answers_are_as_described(server_url):
    document = schemathesis.openapi.from_url(f"{server_url}/openapi.json")
    operations = [result.ok() for result in document.get_all_operations()]
    assert len(operations) > 40
    for operation in operations:
        _try(operation)


def _try(operation):
    @settings(
        max_examples=3,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy())
    def check(case):
        case.call_and_validate(checks=CHECKS)

    check()
