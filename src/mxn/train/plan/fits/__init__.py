"""Constants fitted on public runs, with the rows they were fitted on. Start at `load`.

Written by `bench/train/fit.py`, never by hand. The only place in `plan` that reads a file.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Any

from mxn.errors import UserError
from mxn.train.plan.analytic import Roofline


@cache
def load(name: str) -> dict[str, Any]:
    """Return a fit by name. Raises: UserError for a name that there is none of."""
    path = files(__name__) / f"{name}.json"
    if not path.is_file():
        raise UserError(f"no fit {name!r}", hint="there are: roofline, sailor, vtrain-profiles")
    return json.loads(path.read_text())


def roofline() -> Roofline:
    """Return the roofline fitted on vTrain's A100 runs, for `analytic.derive_profile`."""
    return Roofline(**load("roofline")["constants"])
