"""Orders of actions: complete, free of deadlocks, with the memory that their papers promise."""

import pytest

from mxn.errors import ConfigError, UnsupportedError, UserError
from mxn.train.plan.memory import in_flight
from mxn.train.plan.order_check import validate
from mxn.train.plan.order_csv import from_csv, to_csv
from mxn.train.plan.schedules import Action, order, split_backwards, stored_peak

CASES = [
    (schedule, stages, chunks, batches)
    for schedule in ("gpipe", "1f1b", "interleaved", "zero-bubble")
    for stages in (1, 2, 3, 5)
    for chunks in ((1,) if schedule in ("gpipe", "1f1b") else (1, 2, 3))
    for batches in (1, 2, 5, 7, 12)
]


def _text(row):
    return " ".join(f"{kind}{batch}" for kind, _, batch in row)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_order_is_complete_and_ends(case):
    schedule, stages, chunks, batches = case
    rows = order(schedule, stages, chunks, batches)
    validate(rows, num_chunks=chunks, num_micro_batches=batches)
    assert len(rows) == stages
    per_pass = 3 if schedule == "zero-bubble" else 2
    assert {len(row) for row in rows} == {per_pass * chunks * batches}


def test_1f1b_is_the_published_order():
    rows = order("1f1b", 3, 1, 4)
    assert [_text(row) for row in rows] == [
        "F0 F1 F2 B0 F3 B1 B2 B3",
        "F0 F1 B0 F2 B1 F3 B2 B3",
        "F0 B0 F1 B1 F2 B2 F3 B3",
    ]


def test_gpipe_does_all_forwards_first():
    assert [_text(row) for row in order("gpipe", 2, 1, 2)] == ["F0 F1 B0 B1"] * 2


def test_zero_bubble_delays_weight_halves_by_the_number_of_the_stage():
    rows = order("zero-bubble", 2, 1, 3)
    assert _text(rows[0]) == "F0 F1 B0 W0 F2 B1 W1 B2 W2"
    assert _text(rows[1]) == "F0 B0 F1 B1 W0 F2 B2 W1 W2"
    assert split_backwards(rows[0]) == {(0, 0), (0, 1), (0, 2)}


@pytest.mark.parametrize("stages", [2, 4, 7])
def test_1f1b_stores_fewer_micro_batches_the_nearer_the_loss(stages):
    rows = order("1f1b", stages, 1, 20)
    assert [stored_peak(row) for row in rows] == list(range(stages, 0, -1))


@pytest.mark.parametrize("stages", [2, 4, 7])
def test_zero_bubble_stores_nowhere_more_than_1f1b_on_its_first_stage(stages):
    rows = order("zero-bubble", stages, 1, 20)
    assert {stored_peak(row) for row in rows} == {stages}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_predictors_closed_form_of_what_is_stored_is_that_of_the_order(case):
    schedule, stages, chunks, batches = case
    stored = [stored_peak(row) / chunks for row in order(*case)]
    closed = [in_flight(schedule, stage, stages, batches, chunks) for stage in range(stages)]
    assert closed == stored
    ahead = (2,) * stages
    stored = [stored_peak(row) / chunks for row in order(*case, extra_warmup=ahead)]
    assert stored == [
        in_flight(schedule, stage, stages, batches, chunks, ahead) for stage in range(stages)
    ]


def test_gpipe_stores_every_micro_batch():
    assert {stored_peak(row) for row in order("gpipe", 3, 1, 9)} == {9}


def test_extra_warmup_is_stored_and_starts_backward_later():
    rows = order("1f1b", 3, 1, 12, extra_warmup=(2, 2, 0))
    assert [stored_peak(row) for row in rows] == [5, 4, 1]
    validate(rows)


def test_extra_warmup_that_rises_is_refused():
    with pytest.raises(ConfigError, match=r"not rise along the stages, got \(0, 3\)"):
        order("1f1b", 2, 1, 8, extra_warmup=(0, 3))


def test_extra_warmup_that_makes_chunks_wait_for_ever_is_refused():
    with pytest.raises(ConfigError, match="never ends"):
        order("interleaved", 4, 2, 16, extra_warmup=(9, 9, 0, 0))
    for extra in ((2, 2, 0, 0), (1, 0, 0, 0), 3):
        validate(order("interleaved", 4, 2, 16, extra_warmup=extra))


def test_counts_and_names_that_no_order_has_are_refused():
    with pytest.raises(ConfigError, match="unknown schedule '2f2b'"):
        order("2f2b", 2, 1, 4)
    with pytest.raises(ConfigError, match="num_micro_batches must be at least 1, got 0"):
        order("1f1b", 2, 1, 0)
    with pytest.raises(UnsupportedError, match="one chunk per stage, got 2"):
        order("1f1b", 2, 2, 4)


def _replaced(rows, stage, row):
    return (*rows[:stage], tuple(row), *rows[stage + 1 :])


def test_a_missing_action_is_named():
    rows = order("1f1b", 2, 1, 3)
    lacking = [action for action in rows[1] if action != Action("B", 0, 1)]
    with pytest.raises(ConfigError, match="stage 1 lacks B1"):
        validate(_replaced(rows, 1, lacking))


def test_a_doubled_action_is_named():
    rows = order("1f1b", 2, 1, 3)
    with pytest.raises(ConfigError, match="stage 0 does F2 twice"):
        validate(_replaced(rows, 0, (*rows[0], Action("F", 0, 2))))


def test_a_backward_before_its_forward_is_named():
    rows = order("gpipe", 1, 1, 2)
    with pytest.raises(ConfigError, match="stage 0 does B1 before F1"):
        validate(_replaced(rows, 0, [rows[0][0], rows[0][3], rows[0][1], rows[0][2]]))


def test_a_deadlock_names_who_waits_for_what():
    # Stage 0 wants the first gradient before it feeds the forward that stage 1 does before it.
    rows = (
        (Action("F", 0, 0), Action("B", 0, 0), Action("F", 0, 1), Action("B", 0, 1)),
        (Action("F", 0, 0), Action("F", 0, 1), Action("B", 0, 0), Action("B", 0, 1)),
    )
    with pytest.raises(
        ConfigError, match="stage 0 at B0 waits for B0 of part 1 on stage 1; stage 1 at F1 waits"
    ):
        validate(rows)


def test_an_action_of_a_micro_batch_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match="there is no F3: it has 1 chunks and 3 micro-batches"):
        validate(order("1f1b", 2, 1, 4), num_micro_batches=3)


@pytest.mark.parametrize("case", CASES[::3], ids=str)
def test_csv_gives_the_same_order_back(case):
    rows = order(*case)
    assert from_csv(to_csv(rows)) == rows


def test_csv_is_written_in_torchs_words():
    assert to_csv(order("zero-bubble", 2, 1, 1)) == "0F0,0I0,0W0\n1F0,1I0,1W0\n"


def test_csv_may_hold_gaps_and_communication():
    text = "0F0,,0SEND_F0,0RECV_B0,0B0,0REDUCE_GRAD\n1RECV_F0,1F0,1B0,1SEND_B0,\n"
    assert from_csv(text) == order("1f1b", 2, 1, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0F0,0X0\n1F0,1B0\n", "mine.csv:1: '0X0' is no action"),
        ("0F0,0B0\n1F0,1I0\n", "mine.csv:2: '1I0' has no W"),
        ("0F0,0B0,0W0\n1F0,1B0\n", "mine.csv:1: '0B0' is a whole backward"),
        ("0F0,3F0\n1F0,2F0\n", "mine.csv:1: '3F0' puts part 3 on stage 0 of 2"),
        ("0F0,(0F1;0B0)OVERLAP_F_B\n1F0,1B0\n", "overlaps two passes"),
        ("", "stage 0 has no action"),
    ],
)
def test_csv_that_is_no_order_is_refused(text, message):
    with pytest.raises(UserError) as raised:
        from_csv(text, source="mine.csv")
    assert message in str(raised.value)
