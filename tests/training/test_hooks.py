"""A time budget holds on a machine that becomes five times slower or faster, shown with a clock that is passed in."""

import math
import random
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import tiny

from gptworks.core.config import Change
from gptworks.planning.budget import MOST_PLANS, SAVING_SECONDS, Pace, can_hold, planned_end
from gptworks.planning.choices import Facts, Measured
from gptworks.planning.choose import choose
from gptworks.training.hooks import TimeBudget
from gptworks.training.schedule import SCHEDULES, RunSchedule

SHAPES = sorted(set(SCHEDULES) - {"range"})
BUDGET, BEGIN = 1000.0, 8.0
MOMENTS = [0.02, 0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.85, 0.93, 0.96]


@dataclass
class Lived:
    """How a run went: when its model was written, its schedule, and the steps at which it was evaluated."""

    end: float
    schedule: RunSchedule
    evaluated: list[int]


def live(
    schedule="wsd", *, step=2.0, evaluation=12.0, moment=2.0, factor=1.0, wave=0.0, asked=None, pauses=(), pace=None,
    timed=1.0,
) -> Lived:  # fmt: skip
    """A run of which a step takes `step` seconds, `factor` times as many from `moment` of the budget on, and `pace` as
    many at each second; `pauses` are seconds that some steps take besides. An evaluation was timed as so many times
    what it takes."""
    now = BEGIN

    def slowness() -> float:
        late = factor if now >= moment * BUDGET else 1.0
        return late * (1 + wave * (int(now) % 7 - 3) / 3) * (pace[int(now)] if pace else 1.0)

    measured = Measured(None, step, evaluation * timed, BUDGET - BEGIN)
    keys = {"context": 32, "batch_tokens": 1024, "time_budget_s": BUDGET, "schedule": schedule, "eval_every": asked}
    config = tiny.chosen_config(train=keys)
    train = choose(config, Facts(vocab_size=300, epoch_tokens=10**6, measured=measured), tiny.MACHINE).chosen.train
    changes: list[Change] = []
    course, evaluated = RunSchedule(train, changes), []
    budget = TimeBudget(
        train, course, measured=measured, most=10**9, may_leave_out=asked is None, from_step=0,
        record=changes.append, clock=lambda: now, evaluation_now=lambda: evaluation * slowness(),
    )  # fmt: skip
    state = SimpleNamespace(step=0)
    while state.step < course.length:
        state.step += 1
        now += step * slowness() + dict(pauses).get(state.step, 0.0)
        budget(state, None)
        if course.evaluates(state.step) and state.step < course.length:
            seconds = evaluation * slowness()
            now += seconds
            budget.time_evaluation(seconds)
            evaluated.append(state.step)
    now += (evaluation + SAVING_SECONDS) * slowness()
    return Lived(now, course, evaluated)


@pytest.mark.parametrize("factor", [5.0, 0.2, 1.0])
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("schedule", SHAPES)
def test_a_budget_holds_whatever_the_machine_does_from_any_moment_on(schedule, moment, factor):
    every = schedule == "wsd"
    short = [0.5] if moment in MOMENTS[::3] else []  # thousands of steps
    for step in (*short, 2.0, 10.0) if every else (4.0,):  # up to a hundredth of the budget
        for evaluation in (0.1, 12.0, 19.5) if every else (12.0,):  # up to a fiftieth, with saving
            assert can_hold(BUDGET, Pace(step, evaluation))
            run = live(schedule, step=step, evaluation=evaluation, moment=moment, factor=factor)
            told = f"{schedule}, {factor} times from {moment}: step {step}, evaluation {evaluation}"
            assert 0.9 * BUDGET <= run.end <= 1.1 * BUDGET, f"{told}: {run.end:.0f} s"
            assert len(run.schedule.changes) <= MOST_PLANS, told


@pytest.mark.parametrize("wave", [0.1, 0.5])
def test_a_pace_that_is_never_steady_uses_up_no_plans(wave):
    run = live(wave=wave)
    assert 0.9 * BUDGET <= run.end <= 1.1 * BUDGET and len(run.schedule.changes) <= MOST_PLANS


@pytest.mark.parametrize("pause", [0.02, 0.05, 0.2])
@pytest.mark.parametrize("step", [2, 3, 150])
@pytest.mark.parametrize("seconds", [0.5, 2.0, 10.0])
def test_one_step_that_the_system_held_up_does_not_end_a_run(seconds, step, pause):
    """A fault that was seen: a step of 0.3 s of 6 s, the second, left room for 2 steps instead of 365."""
    run = live(step=seconds, pauses=[(step, pause * BUDGET)])
    assert 0.9 * BUDGET <= run.end <= 1.1 * BUDGET and len(run.schedule.changes) <= 3
    assert run.schedule.length * seconds >= (0.85 - pause) * BUDGET  # the rest is evaluations, and the pause


@pytest.mark.parametrize("lasting", [30, 200])  # seconds, of a budget of 1,000
def test_a_machine_that_others_use_too_ends_in_time_with_plans_to_spare(lasting):
    """Each second is as fast as the ones before and by chance otherwise: a third slower or faster, mostly."""
    for seed in range(10):
        draw, level, pace = random.Random(seed), 0.0, []
        for _ in range(20 * int(BUDGET)):
            level = level * math.exp(-1 / lasting) + math.sqrt(1 - math.exp(-2 / lasting)) * draw.gauss(0, 1)
            pace.append(math.exp(0.3 * level))
        run = live(step=5.0, pace=pace)
        assert 0.9 * BUDGET <= run.end <= 1.1 * BUDGET and len(run.schedule.changes) < MOST_PLANS, seed


@pytest.mark.parametrize("seconds", [2.0, 10.0])
def test_an_evaluation_that_was_timed_at_a_busy_moment_costs_no_run(seconds):
    """A fault that was seen: one of 4 s counted as 31 steps, and a run of 60 s ended after 6 steps, at 19 s."""
    run = live(step=seconds, timed=10.0, moment=0.1, factor=3.0)
    assert 0.9 * BUDGET <= run.end <= 1.1 * BUDGET


@pytest.mark.parametrize("factor", [5.0, 0.2])
@pytest.mark.parametrize("schedule", SHAPES)
def test_the_rate_keeps_its_curve_over_the_share_of_the_run(schedule, factor):
    """What another plan changes is how fast the share is passed: the rate at a share is the planned one's."""
    run = live(schedule, moment=0.6, factor=factor)
    course, plain = run.schedule, RunSchedule(run.schedule.train, [])
    assert course.changes
    rates = [course.factor(step) for step in range(course.length)]
    shares = [course._planned_step(step) for step in range(course.length + 1)]
    assert shares == sorted(shares) and shares[-1] == pytest.approx(course.planned)
    planned = [plain.factor(step) for step in range(plain.length + 1)]
    for step, rate in enumerate(rates):
        low, high = int(shares[step]), int(shares[step]) + 1
        assert min(planned[low], planned[high]) - 1e-9 <= rate <= max(planned[low], planned[high]) + 1e-9
    top = max(range(len(rates)), key=lambda step: rates[step])
    falling = rates[top:]
    assert all(later <= earlier + 1e-12 for earlier, later in zip(falling, falling[1:], strict=False))


def test_evaluations_that_nobody_asked_for_are_left_out_before_steps_are():
    asked, free = live(moment=0.5, factor=5.0, asked=60), live(moment=0.5, factor=5.0)
    assert asked.evaluated and max(asked.evaluated) > 0.5 * asked.schedule.length
    assert any(not change.evaluations for change in free.schedule.changes)
    first = next(change.step for change in free.schedule.changes if not change.evaluations)
    assert not [step for step in free.evaluated if step > first] and [step for step in asked.evaluated if step > first]


@pytest.mark.parametrize("factor", [5.0, 0.2])
def test_evaluations_that_were_asked_for_are_at_their_steps_of_the_run_as_it_was_run(factor):
    run = live(moment=0.3, factor=factor, asked=20)
    assert run.schedule.changes and run.evaluated == list(range(20, run.schedule.length, 20))
    assert 0.9 * BUDGET <= run.end <= 1.1 * BUDGET


def test_a_plan_recorded_by_an_earlier_version_keeps_its_meaning():
    train = tiny.settings(max_steps=100, schedule="wsd", cooldown=0.5, warmup=0.0)
    old = RunSchedule(train, [Change(step=20, length=200, stretch=True)])
    assert old.length == 200 and old.factor(99) == 1.0 and old.factor(150) == pytest.approx(1 - (50 / 100) ** 0.5)
    assert [step for step in range(1, 201) if old.due(step, 25)] == [50, 100, 150, 200]


def test_the_start_says_what_can_be_held_where_steps_are_long():
    measured = Measured(None, step_seconds=30.0, eval_seconds=5.0, left_seconds=900.0)
    config = tiny.chosen_config(train={"context": 32, "batch_tokens": 1024, "time_budget_s": BUDGET})
    choices = choose(config, Facts(vocab_size=300, epoch_tokens=10**6, measured=measured), tiny.MACHINE)
    assert "a step takes 3.0% of it, an evaluation with saving 0.5%" in choices.warnings[0]
    assert not can_hold(BUDGET, Pace(30.0, 5.0)) and 0.9 * BUDGET < planned_end(BUDGET, Pace(30.0, 5.0)) < BUDGET
    for factor in (1.0, 5.0):
        assert live(step=30.0, evaluation=5.0, moment=0.5, factor=factor).end <= 1.2 * BUDGET
