"""What was measured for a model on this machine, put to use at load.

Start at `settle`; `mxn tune` measures what is missing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mxn.kernels.native import dataflow
from mxn.kernels.native.library import library
from mxn.kernels.tune import Table
from mxn.models.native import calibrate

if TYPE_CHECKING:
    from mxn.models.native.decoder import NativeDecoder

Report = Callable[[int, int], None]  # done, total


def table() -> Table:
    """Return the measured times of this processor's native kernels."""
    return Table.open(f"native-{library().variant()}")


def settle(
    model: NativeDecoder,
    config_json: dict[str, Any],
    num_threads: int,
    report: Report | None = None,
) -> dict[str, str]:
    """Use the measured dataflow and the stored maxima; return what was chosen, and why."""
    notes: dict[str, str] = {}
    known, found = table(), {}
    weights = model.linears()
    for done, weight in enumerate(weights):
        rows, reason = dataflow.tiled_from(weight, known, num_threads)
        found[dataflow.key_of(weight, num_threads)] = rows
        shape = f"{weight.in_features}x{weight.out_features} {weight.format}"
        way = "flat" if rows == dataflow.NEVER else f"tiled from {rows} rows"
        notes[f"linear[{shape}]"] = f"{way}: {reason}"
        if report:
            report(done + 1, len(weights))
    model.set_dataflow(found, lambda weight: dataflow.key_of(weight, num_threads))
    notes["maximum"] = use_maxima(
        model, calibrate.stored(calibrate.fingerprint(config_json, model))
    )
    return notes


def use_maxima(model: NativeDecoder, maxima: list[calibrate.Maximum] | None) -> str:
    """Let attention subtract calibrated maxima where there are some; return what it does."""
    if maxima is None or len(maxima) != len(model.spec.layers):
        return "each row its own: not calibrated (`mxn tune`)"
    model.use_maxima([(m.phi, m.margin) for m in maxima])
    num_unified = sum(m.margin > 0 for m in maxima)
    return f"unified in {num_unified} of {len(maxima)} layers: calibrated"
