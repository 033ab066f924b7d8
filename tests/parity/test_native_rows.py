"""Native kernels give a row the same bits alone, behind others of its sequence, and in company.

Guessed tokens (docs/design/0012-speculation.md) leave answers as they are because of it.
"""

from __future__ import annotations

import pytest
import torch

from mxn.engine.config import EngineConfig
from mxn.engine.local import LocalEngine
from mxn.models.catalogue import shipped_dir
from support.paged import Session

TOKENS = [(7 * i * i + 3 * i) % 1000 for i in range(72)]
START = 36


@pytest.fixture(scope="module", params=["int8", "int4", "bf16", "f32"])
def weights(request) -> str:
    return request.param


@pytest.fixture(scope="module", params=["mxn-shakespeare-llama", "mxn-shakespeare-dsv3"])
def model(request, weights):
    config = EngineConfig(
        model=str(shipped_dir() / request.param), weights=weights, threads=1, max_sequences=2
    )
    return LocalEngine.load(config).core._runner._model


@pytest.fixture(scope="module")
def alone(model) -> torch.Tensor:
    session = Session(model)
    session.step({0: TOKENS[:START]})
    return torch.cat([session.step({0: [token]})[0] for token in TOKENS[START:]])


@pytest.mark.parametrize("rows", [2, 3, 4, 5, 8, 9, 12])
def test_rows_of_one_sequence_do_not_see_each_other(model, alone, rows):
    session = Session(model)
    session.step({0: TOKENS[:START]})
    starts = range(START, len(TOKENS), rows)
    together = torch.cat([session.step({0: TOKENS[i : i + rows]})[0] for i in starts])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("company", [1, 4, 7, 8, 11])
def test_a_sequence_does_not_see_others(model, alone, company):
    session = Session(model)
    session.step({0: TOKENS[:START]})
    for other in range(1, company + 1):
        session.step({other: TOKENS[other : 2 * other + 3]})
    everyone = range(company + 1)
    steps = [session.step({i: [token] for i in everyone})[0] for token in TOKENS[START:]]
    assert torch.equal(torch.cat(steps), alone)
