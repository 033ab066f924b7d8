"""The engine suite runs on any device: MXN_TEST_DEVICE names it, by default the CPU."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from mxn.engine.config import EngineConfig
from mxn.engine.testing import torch_device

TINY = "mxn.engine.testing:load_tiny"


@pytest.fixture(scope="session")
def engine_device() -> str:
    """The torch device string of the device under test, its backend loaded."""
    return torch_device(os.environ.get("MXN_TEST_DEVICE", "cpu"))


@pytest.fixture(autouse=True)
def no_clock_for_drafts(monkeypatch) -> None:
    """Whether drafts pay depends on how long steps take; a test must not."""
    monkeypatch.setattr("mxn.engine.draft.RowCost.observe", lambda *_: None)


@pytest.fixture
def tiny_config(engine_device) -> Callable[..., EngineConfig]:
    """Settings of a replica that runs `TinyModel` or `TinyEncoder`."""

    def config(model: str = "tiny", **settings: Any) -> EngineConfig:
        defaults = {"page_tokens": 4, "max_batch_tokens": 64, "max_sequences": 16, "threads": 1}
        return EngineConfig(model=model, loader=TINY, device=engine_device, **(defaults | settings))

    return config


def run(coroutine: Coroutine[Any, Any, Any], timeout_s: float = 60.0) -> Any:
    """Run an async test; what hangs fails with a traceback of where."""

    async def bounded() -> Any:
        async with asyncio.timeout(timeout_s):
            return await coroutine

    return asyncio.run(bounded())
