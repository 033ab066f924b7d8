"""The simulator on the public measured plans: against the closed form and against the clock."""

from functools import cache
from pathlib import Path

import pytest

from mxn.train.plan.predict import Tuning, predict
from mxn.train.plan.sets.sailor import SAILOR_MEMORY, SailorCase, cases
from mxn.train.plan.simulate import Simulation, simulate_plan

DATA = Path(__file__).parents[2] / "data/training/sailor"
# As DeepSpeed's pipeline engine and NCCL work; nothing fitted.
TUNING = Tuning(late_sends=True, flat_sums=True)


@cache
def _cases() -> dict[str, SailorCase]:
    names = (tuple(path.stem.split("__")) for path in sorted(DATA.glob("*__*.json")))
    found = cases(
        (DATA / "measured-plans.csv").read_text(),
        (DATA / "llm_info.json").read_text(),
        (DATA / "network_coeffs.json").read_text(),
        {(m, chip): (DATA / f"{m}__{chip}.json").read_text() for m, chip in names},
    )
    return {case.name: case for case in found}


def _simulated(case: SailorCase, tuning: Tuning = TUNING) -> Simulation:
    return simulate_plan(
        case.plan, case.shape, case.cluster, case.profiles, memory=SAILOR_MEMORY, tuning=tuning
    )


@pytest.mark.parametrize("name", sorted(_cases()))
def test_the_closed_form_is_near_the_simulation(name):
    case = _cases()[name]
    closed = predict(
        case.plan, case.shape, case.cluster, case.profiles, memory=SAILOR_MEMORY, tuning=TUNING
    )
    done = _simulated(case).prediction
    assert done.iteration_s == pytest.approx(closed.iteration_s, rel=0.015)
    assert [row.memory_bytes for row in done.stages] == pytest.approx(
        [row.memory_bytes for row in closed.stages]
    )


def test_the_slow_links_of_a_mixed_pipeline_are_in_the_step():
    """The row that a sum of passes misses by half, for its links are slow."""
    case = _cases()["mit/N4/N4_D1"]
    done = _simulated(case)
    error = done.prediction.iteration_s / case.measured_s - 1
    assert abs(error) < 0.15, f"simulated {error:+.1%} of the measured step"
    line = done.timeline(0)
    assert max(line.busy_s) < 0.75 * line.makespan_s
