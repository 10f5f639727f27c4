"""Pipeline schedules: every rule by replay, the closed forms of the papers, and what they cost."""

from dataclasses import fields, replace

import numpy as np
import pytest

from jaxtune.cli import main
from jaxtune.errors import MeshError
from jaxtune.parallel.replay import check
from jaxtune.parallel.schedule import SCHEDULES, Schedule, bubble, costs, make_schedule, picture

GRID = [
    (name, S, M, V)
    for name in SCHEDULES
    for S in (1, 2, 3, 4, 8)
    for M in (1, 2, 3, 4, 6, 8, 16, 24)
    for V in ((2, 3, 4) if name == "interleaved" else (1,))
    if name != "interleaved" or M % S == 0
]


@pytest.mark.parametrize(("name", "S", "M", "V"), GRID)
def test_a_replay_finds_everything_in_its_place(name, S, M, V):
    check(make_schedule(name, S, M, V))


def tables(schedule: Schedule) -> list[str]:
    return [field.name for field in fields(schedule) if isinstance(getattr(schedule, field.name), np.ndarray)]


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_table_with_one_wrong_entry_fails(name):
    schedule = make_schedule(name, 3, 6, 2 if name == "interleaved" else 1)
    broken = 0
    for table in tables(schedule):
        values = getattr(schedule, table)
        for tick, stage in np.argwhere(values >= 0):
            for wrong in {-1, int(values[tick, stage]) + 1, int(values[tick, stage]) - 1} - {int(values[tick, stage])}:
                copy = values.copy()
                copy[tick, stage] = wrong
                with pytest.raises(AssertionError):
                    check(replace(schedule, **{table: copy}))
                broken += 1
    assert broken > 100


def test_an_entry_where_nothing_happens_fails():
    schedule = make_schedule("1f1b", 3, 6)
    for table in ("recv_f_slot", "recv_b_slot", "b_micro", "f_chunk"):
        copy = getattr(schedule, table).copy()
        copy[-1, 0 if table != "b_micro" else 2] = 0
        with pytest.raises(AssertionError):
            check(replace(schedule, **{table: copy}))


def test_a_table_cut_short_fails():
    schedule = make_schedule("gpipe", 2, 3)
    with pytest.raises(AssertionError, match="no backward"):
        check(replace(schedule, **{table: getattr(schedule, table)[:-1] for table in tables(schedule)}))


def test_two_arrays_in_one_slot_fail():
    schedule = make_schedule("gpipe", 2, 3)
    one = {name: np.minimum(getattr(schedule, name), 0) for name in ("f_slot", "b_slot", "recv_f_slot")}
    with pytest.raises(AssertionError, match="still holds"):
        check(replace(schedule, **one))


def test_1f1b_is_its_closed_form():
    schedule = make_schedule("1f1b", 4, 8)
    for stage in range(4):
        for micro in range(8):
            assert schedule.f_micro[micro + stage, stage] == micro
            assert schedule.b_micro[micro + 2 * 3 - stage, stage] == micro
    assert schedule.ticks == 8 + 2 * 3


def test_interleaved_goes_through_its_chunks_in_megatrons_order():
    S, V, M = 4, 2, 8
    schedule = make_schedule("interleaved", S, M, V)
    for stage in range(S):
        for k in range(M * V):
            g, rest = divmod(k, S * V)
            forward, backward = schedule.f_chunk[k + stage, stage], k + (V - 1) * S + 2 * (S - 1) - stage
            assert schedule.f_micro[k + stage, stage] == schedule.b_micro[backward, stage] == g * S + k % S
            assert forward == (rest // S) * S + stage
            assert schedule.b_chunk[backward, stage] == (V - 1 - rest // S) * S + stage


def test_1f1b_keeps_no_more_for_more_micro_batches_and_gpipe_keeps_all():
    slots = {name: [make_schedule(name, 4, M).num_slots for M in (8, 16, 64)] for name in ("1f1b", "gpipe")}
    assert slots == {"1f1b": [5, 5, 5], "gpipe": [8, 16, 64]}
    assert make_schedule("1f1b", 4, 64).num_grad_slots == make_schedule("gpipe", 4, 64).num_grad_slots == 1


def test_interleaved_and_zero_bubble_keep_no_more_for_more_micro_batches():
    for name, virtual in (("interleaved", 2), ("zero_bubble", 1)):
        few, many = (make_schedule(name, 4, M, virtual) for M in (16, 64))
        assert (few.num_slots, few.num_grad_slots) == (many.num_slots, many.num_grad_slots)


@pytest.mark.parametrize("S", [2, 4, 8])
@pytest.mark.parametrize("M", [8, 16, 64])
def test_bubbles_are_those_of_the_papers(S, M):
    assert bubble(make_schedule("1f1b", S, M)) == pytest.approx((S - 1) / (M + S - 1))
    assert bubble(make_schedule("gpipe", S, M)) == pytest.approx((S - 1) / (M + S - 1))
    for V in (2, 4):
        assert bubble(make_schedule("interleaved", S, M, V)) == pytest.approx((S - 1) / (M * V + S - 1))
    if M >= 2 * (S - 1):
        assert bubble(make_schedule("zero_bubble", S, M)) == pytest.approx((S - 1) / (3 * M + S - 1))


def test_the_bubble_shrinks_from_1f1b_to_interleaved_and_to_zero_bubble():
    plain, zero = bubble(make_schedule("1f1b", 4, 8)), bubble(make_schedule("zero_bubble", 4, 8))
    chunked = [bubble(make_schedule("interleaved", 4, 8, V)) for V in (2, 4)]
    assert chunked[1] < chunked[0] < plain
    assert zero < plain


def step_cost(name, S, M, *parts):
    return costs(make_schedule(name, S, M), *parts).sum()


def test_zero_bubble_loses_when_the_weight_gradient_computes_everything_again():
    """The numbers of docs/parallelism.md: forward, backward (of the input where it is split), weight gradient."""
    for S in (2, 3, 4, 8, 16):
        for M in (1, 2, 3, 4, 8, 16, 64):
            assert step_cost("zero_bubble", S, M, 1, 2, 3) > step_cost("1f1b", S, M, 1, 3), (S, M)
    assert (step_cost("zero_bubble", 4, 8, 1, 2, 3), step_cost("1f1b", 4, 8, 1, 3)) == (57, 44)
    assert (step_cost("zero_bubble", 4, 8, 1, 1, 1), step_cost("1f1b", 4, 8, 1, 2)) == (27, 33)


def test_one_stage_waits_for_nobody():
    schedule = make_schedule("1f1b", 1, 3)
    assert bubble(schedule) == 0 and schedule.ticks == 3 and schedule.num_slots == 0


def test_a_small_1f1b_as_a_picture():
    assert picture(make_schedule("1f1b", 2, 3)).splitlines() == [
        "tick | stage 0 | stage 1",
        "   0 | F0      |",
        "   1 | F1      | F0 B0",
        "   2 | F2 B0   | F1 B1",
        "   3 |    B1   | F2 B2",
        "   4 |    B2   |",
        "1f1b: 2 stages, 3 micro-batches: bubble 25.0%; kept at once: stage inputs 1, output gradients 1",
    ]


def test_a_small_interleaved_as_a_picture():
    assert picture(make_schedule("interleaved", 2, 2, 2)).splitlines() == [
        "tick | stage 0 | stage 1",
        "   0 | F0a     |",
        "   1 | F1a     | F0a",
        "   2 | F0b     | F1a",
        "   3 | F1b     | F0b B0b",
        "   4 |     B0b | F1b B1b",
        "   5 |     B1b |     B0a",
        "   6 |     B0a |     B1a",
        "   7 |     B1a |",
        "interleaved: 2 stages of 2 chunks, 2 micro-batches: bubble 20.0%; "
        "kept at once: stage inputs 3, output gradients 1",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("interleaved", 4, 6, 2), "6 is not a multiple of mesh.pipe 4; 4 or 8 would do"),
        (("interleaved", 4, 3, 2), "3 is not a multiple of mesh.pipe 4; 4 would do"),
        (("interleaved", 4, 8, 1), "must be 2 or more; with 1 it is 1f1b"),
        (("1f1b", 4, 8, 2), "1f1b has one chunk on each stage; use interleaved"),
        (("gpipe", 4, 8, 2), "gpipe has one chunk on each stage"),
        (("1f1b", 0, 8, 1), "0 stages; at least 1"),
        (("1f1b", 4, 0, 1), "0 micro-batches; at least 1"),
        (("interleave", 4, 8, 2), 'did you mean "interleaved"'),
    ],
)
def test_numbers_that_do_not_fit_are_refused_with_those_that_would(arguments, message):
    with pytest.raises(MeshError, match=message):
        make_schedule(*arguments)


def test_the_command_prints_the_picture(capsys):
    with pytest.raises(SystemExit) as end:
        main(["schedule", "--name", "interleaved", "--stages", "4", "--micro-batches", "8", "--virtual", "2"])
    assert end.value.code == 0
    assert capsys.readouterr().out == picture(make_schedule("interleaved", 4, 8, 2)) + "\n"


def test_the_command_refuses_with_exit_code_2(capsys):
    with pytest.raises(SystemExit) as end:
        main(["schedule", "--name", "1f1b", "--stages", "4", "--micro-batches", "8", "--virtual", "2"])
    assert end.value.code == 2
    assert "use interleaved" in capsys.readouterr().err
