"""The course of a run: rates step by step, and changes on the way that never make the rate jump."""

import math

import pytest
import tiny

from gptworks.core.config import Change
from gptworks.training.schedule import SCHEDULES, RunSchedule

SMOOTH = sorted(set(SCHEDULES) - {"step", "range"})


def course(schedule: str = "wsd", steps: int = 100, changes: tuple[Change, ...] = (), **values) -> RunSchedule:
    return RunSchedule(tiny.settings(schedule=schedule, max_steps=steps, changes=changes, **values))


def rates(made: RunSchedule) -> list[float]:
    return [made.factor(step) for step in range(made.length)]


def largest_jump(values: list[float], around: int, width: int = 3) -> float:
    return max(abs(values[i] - values[i - 1]) for i in range(max(around - width, 1), min(around + width, len(values))))


@pytest.mark.parametrize("schedule", SMOOTH)
@pytest.mark.parametrize("at", [30, 70, 100])
def test_extending_a_run_makes_no_jump_and_ends_where_the_schedule_ends(schedule, at):
    before = rates(course(schedule))
    extended = rates(course(schedule, changes=(Change(step=at, length=300),)))
    assert extended[:at] == before[:at] and len(extended) == 300
    steepest = max(abs(a - b) for a, b in zip(before, before[1:], strict=False))
    assert largest_jump(extended, at) <= max(steepest, 1 / (0.1 * (300 - at) + 1)) + 1e-12
    assert extended[-1] == pytest.approx(rates(course(schedule, 300))[-1], abs=1e-12)


def test_extending_a_flat_run_leaves_it_flat():
    extended = rates(course("wsd", changes=(Change(step=30, length=300),)))
    assert extended[20:150] == [1.0] * 130 and extended[-1] < 0.1


@pytest.mark.parametrize("schedule", SMOOTH)
@pytest.mark.parametrize("at", [20, 40])
def test_decay_now_falls_from_where_the_rate_stands_to_the_floor(schedule, at):
    plain = course(schedule, min_lr=0.01)
    change = plain.decay_from(at)
    bent = course(schedule, min_lr=0.01, changes=(change,))
    values = rates(bent)
    assert values[at] == plain.factor(at - 1)  # no jump
    assert all(later <= earlier for earlier, later in zip(values[at:], values[at + 1 :], strict=False))
    share = (change.length - 1 - at) / (change.length - at)
    assert values[-1] == pytest.approx(0.01 + (values[at] - 0.01) * (1 - math.sqrt(share)))
    assert at < change.length <= 100


def test_a_run_may_be_extended_again_and_after_a_decay():
    changes = (Change(step=40, length=60, decay=True), Change(step=60, length=200), Change(step=150, length=400))
    values = rates(course("cosine", changes=changes))
    assert len(values) == 400
    assert all(abs(a - b) < 0.25 for a, b in zip(values[8:], values[9:], strict=False))


def test_changes_of_the_peak_hold_from_their_step_on_and_leave_the_factor_alone():
    changes = (Change(step=10, lr=0.5), Change(step=20, adam_lr=0.25), Change(step=30, lr=0.125))
    made = course(changes=changes)
    assert rates(made) == rates(course())
    assert made.peaks(9) == {} and made.peaks(10) == {"lr": 0.5}
    assert made.peaks(30) == {"lr": 0.125, "adam_lr": 0.25}


def test_a_time_budget_stretches_the_intervals_and_a_person_does_not():
    by_clock = course(changes=(Change(step=20, length=200, stretch=True),))
    by_hand = course(changes=(Change(step=20, length=200),))
    assert [s for s in range(1, 201) if by_clock.due(s, 25)] == [50, 100, 150, 200]
    later = course(changes=(Change(step=50, length=200, stretch=True),))  # what was due before it stays due in a replay
    assert [s for s in range(1, 201) if later.due(s, 25)] == [25, 50, 150, 200]  # and is not due twice
    twice = course(changes=(Change(step=52, length=108, stretch=True), Change(step=60, length=96, stretch=True)))
    assert [s for s in range(1, 97) if twice.due(s, 25)] == [25, 50, 72, 96]
    shorter = course(changes=(Change(step=50, length=60, stretch=True),))
    assert [s for s in range(1, 61) if shorter.due(s, 25)] == [25, 50, 60]
    assert [s for s in range(1, 201) if by_hand.due(s, 25)] == list(range(25, 201, 25))


def test_what_was_asked_in_steps_is_in_steps_whatever_the_pace():
    asked = course(eval_every=20, changes=(Change(step=33, length=150, pace=True, in_steps=True),))
    assert [s for s in range(1, 151) if asked.evaluates(s)] == [*range(20, 150, 20), 150]
    assert asked.evaluations_before_the_last(33) == 6
    plain = course(eval_every=20, changes=(Change(step=33, length=150, pace=True),))  # as the version before wrote it
    assert [s for s in range(1, 151) if plain.evaluates(s)] == [20, 46, 81, 116, 150]
    assert [s for s in range(1, 151) if plain.due(s, 20, in_steps=True)] == [*range(20, 150, 20), 150]


def test_after_a_longer_length_that_a_person_asked_for_intervals_end_in_steps_again():
    """A fault that was seen: a run whose pace had changed, made longer, had no checkpoint until its end."""
    longer = Change(step=60, length=200, values={"train.eval_every": 30})
    made = course(eval_every=25, changes=(Change(step=50, length=60, pace=True), longer))
    assert [s for s in range(1, 201) if made.due(s, 25)] == [25, 50, 55, 60, *range(75, 200, 25), 200]
    assert [s for s in range(1, 201) if made.evaluates(s)] == [25, 50, 55, 60, 90, 120, 150, 180, 200]
    assert made.evaluations_before_the_last(100) == 3 and made.reaches(200, 1.0)
    assert [s for s in range(61, 201) if made.reaches(s, 0.3) or made.reaches(s, 0.5)] == [100]


def test_the_range_schedule_rises_in_equal_ratios():
    values = rates(course("range", 11, min_lr=1e-5, warmup=0.0))
    assert values[0] == pytest.approx(1e-5) and values[-1] == 1.0
    ratios = [b / a for a, b in zip(values, values[1:], strict=False)]
    assert ratios == pytest.approx([math.sqrt(10)] * 10)
