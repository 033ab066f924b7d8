"""A tenant in an empty ledger of either database."""

from __future__ import annotations

import pytest

from support.ledgers import Tenant, make_tenant


@pytest.fixture
def tenant(database) -> Tenant:
    return make_tenant(database)
