"""What is said when nothing fits."""

from __future__ import annotations

import pytest

from mxn.train.plan.search import nearest
from mxn.train.plan.search.order import Pool
from mxn.train.plan.search.tables import Kind


@pytest.mark.parametrize("num_groups", [12, 64])
def test_the_widths_of_many_groups_are_not_all_listed(num_groups, monkeypatch):
    """Four widths of 64 groups are more choices than a machine could hold."""

    def refuse(*_):
        raise AssertionError("all choices are listed")

    monkeypatch.setattr(nearest, "product", refuse)
    widths = (1, 2, 4, 8)
    options = tuple(tuple(Kind(f"g{g}", tp) for tp in widths) for g in range(num_groups))
    found = nearest._choices(Pool(1, options))
    assert [{kind.tp for kind in kinds} for kinds in found] == [{tp} for tp in widths]


def test_the_widths_of_few_groups_are():
    options = ((Kind("a", 1), Kind("a", 2)), (Kind("b", 1), Kind("b", 4)))
    assert len(nearest._choices(Pool(1, options))) == 4
