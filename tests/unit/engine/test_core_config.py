"""Settings and the size of the page pool: pure arithmetic, checked against hand-made numbers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from mxn.engine.config import EngineConfig
from mxn.engine.kvstore import allocate, page_bytes, plan_pages
from mxn.errors import CapacityError, ConfigError
from mxn.models.spec import KvShape

GQA = KvShape(num_heads=8, k_dim=128, v_dim=128)
MLA = KvShape(num_heads=1, k_dim=576, v_dim=0)


def test_settings_survive_the_way_to_the_process():
    config = EngineConfig(model="a/b", device="sim:1", kv_bytes=2**30, max_context=99)
    assert EngineConfig.from_json(config.to_json()) == config


def model_with(*shapes, dtype=torch.bfloat16):
    """What the cache asks of a model whose cache has no layout of its own."""
    return SimpleNamespace(kv_shapes=shapes, dtype=dtype, device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"page_tokens": 0}, "page_tokens must be at least 1, got 0"),
        ({"threads": -1}, "threads must be 0"),
        ({"kv_fraction": 1.5}, "kv_fraction must be in"),
        ({"kv_bytes": 0}, "kv_bytes"),
        ({"max_context": 0}, "max_context"),
        ({"max_batch_tokens": 8, "max_sequences": 9}, "max_batch_tokens 8 is less than"),
    ],
)
def test_an_impossible_setting_is_refused_with_its_value(settings, part):
    with pytest.raises(ConfigError, match=part):
        EngineConfig(model="x", **settings)


def test_a_setting_of_the_wrong_type_is_refused():
    with pytest.raises(ConfigError, match="page_tokens"):
        EngineConfig.from_json('{"model": "x", "page_tokens": "many"}')


@pytest.mark.parametrize(
    ("shapes", "want"),
    [
        ([GQA] * 32, 32 * 2 * 8 * 128 * 16 * 2),  # Llama-3-8B in bfloat16: 2 MiB a page
        ([MLA] * 61, 70_272 * 16),  # DeepSeek-V3: 70,272 bytes a token
    ],
)
def test_page_bytes_are_those_of_the_papers(shapes, want):
    assert page_bytes(model_with(*shapes), 16) == want


def plan(available, **changes):
    options = {"page_bytes": 100, "page_tokens": 16, "max_sequences": 4, "max_context": 100}
    return plan_pages(**(options | changes), available_bytes=available)


def test_the_pool_is_no_larger_than_what_can_be_used():
    assert (plan(10**9).num_pages, plan(10**9).limited_by) == (28, "demand")
    assert plan(None).num_pages == 28


def test_the_pool_is_no_larger_than_the_memory():
    assert (plan(1050).num_pages, plan(1050).limited_by) == (10, "memory")
    assert plan(1050, is_given=True).limited_by == "kv_bytes"


def test_a_pool_that_cannot_hold_one_context_is_refused():
    with pytest.raises(CapacityError, match="a context of 100 tokens needs 700 B") as caught:
        plan(650)
    assert caught.value.hint == "--max-context 96 fits"


def test_the_cache_has_the_shapes_of_the_contract_and_is_zero():
    cache = allocate(model_with(GQA, MLA), num_pages=3, page_tokens=4)
    assert cache[0].k.shape == cache[0].v.shape == (3, 4, 8, 128)
    assert (cache[1].k.shape, cache[1].v) == ((3, 4, 1, 576), None)
    assert cache[0].k.dtype == torch.bfloat16
    assert all(not layer.k.any() for layer in cache)
    assert cache[0].k.data_ptr() % 64 == 0


def test_a_pool_in_main_memory_costs_nothing_until_it_is_used():
    import psutil

    before = psutil.Process().memory_info().rss
    shape = KvShape(num_heads=8, k_dim=128, v_dim=128)
    cache = allocate(model_with(shape, dtype=torch.float32), num_pages=8192, page_tokens=16)
    assert cache[0].k.nbytes == 2**29
    assert psutil.Process().memory_info().rss - before < 2**26


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"speculation": "luck"}, "one of off, ngram, mtp, got 'luck'"),
        ({"num_draft_tokens": 0}, "num_draft_tokens must be 1 to 32, got 0"),
        ({"max_draft_rows": -1}, "max_draft_rows must be 0 or more, got -1"),
    ],
)
def test_impossible_ways_to_guess_are_refused(settings, part):
    with pytest.raises(ConfigError, match=part):
        EngineConfig(model="x", **settings)
