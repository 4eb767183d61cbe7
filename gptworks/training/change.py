"""Changes that a continued run makes from its present step on: longer, decaying now, at another rate, other values."""

from typing import Any

from gptworks.core import config as configuration
from gptworks.core.config import Change, Config, RunFile
from gptworks.core.errors import RunMismatch
from gptworks.core.log import plural
from gptworks.planning.choices import Choices
from gptworks.planning.choose import LIMITS, limits, set_intervals
from gptworks.planning.machine import here
from gptworks.training.assemble import Run
from gptworks.training.decide import facts_of
from gptworks.training.schedule import EVAL_EVERY, RunSchedule
from gptworks.training.timing import measured_rows

# The flexible keys that the schedule itself knows a change of; any other is a value that holds from a step on.
OF_SCHEDULE = {**dict.fromkeys(LIMITS, "length"), "train.lr": "lr", "train.adam_lr": "adam_lr"}


def asked_change(run: Run, file: RunFile, asked: Config, different: list[tuple[str, Any, Any]]) -> Change | None:
    """The change that a continued run makes from its present step on, now that `flexible` keys `different` were asked
    for; None where there is none. What follows from its length follows from the new one then: how often it is evaluated
    is part of the change, how often it is saved is written into `file`. Raises RunMismatch for what can no longer be
    had."""
    step, schedule = run.state.step, RunSchedule(file.chosen.train, file.changes)
    told, other, why = dict[str, Any](), dict[str, Any](), list[str]()
    limiting = {key for key, _, new in different if key in LIMITS and new is not None}
    for key, old, new in different:
        if key in OF_SCHEDULE:
            if new is None and not (key in LIMITS and limiting):
                raise RunMismatch(f"{key}={old} cannot be left open now: the run has begun; give a value")
            if key not in LIMITS:
                told[OF_SCHEDULE[key]] = new
        elif key == EVAL_EVERY or (key == "train.decay_now" and not new):
            continue
        elif key != "train.decay_now":
            other[key] = new
        why.append(f"{key}={new}" if old is None else f"{key}={new}, was {old}")
    if limiting:
        told["length"] = _new_length(run, schedule, asked=asked, limiting=limiting)
    every = any(key == EVAL_EVERY for key, _, _ in different)
    change = Change(step=step, **told)
    if asked.train.decay_now and any(key == "train.decay_now" for key, _, _ in different):
        if not 0 < step < schedule.length:
            raise RunMismatch(f"train.decay_now=true: the run stands at step {step} of {schedule.length}")
        change = schedule.decay_from(step).model_copy(update=told)
    elif (told or every) and "length" not in told and step == schedule.length:
        first = why[0] if why else f"{EVAL_EVERY}={asked.train.eval_every}"
        raise RunMismatch(f"{first}: the run is finished at step {step}; ask for more steps, tokens or epochs with it")
    if change.length or every:
        intervals = _intervals(run, asked, length=change.length or schedule.length)
        before, now = schedule.eval_every(step + 1), intervals.config.train.eval_every
        other[EVAL_EVERY] = now
        if every or now != before:
            reason = intervals.reasons.get(EVAL_EVERY)
            why.append(f"{EVAL_EVERY}={now}, was {before}" + (f" ({reason})" if reason else ""))
        saved = "train.checkpoint_every"
        if file.asked.train.checkpoint_every is None and saved in intervals.reasons:
            file.chosen = configuration.with_values(file.chosen, {saved: intervals.config.train.checkpoint_every})
            file.reasons[saved] = intervals.reasons[saved]
    return change.model_copy(update={"values": other, "why": "; ".join(why)}) if why else None


def _intervals(run: Run, asked: Config, length: int) -> Choices:
    """The intervals that were not asked for, for a run of another length."""
    wanted = {key: configuration.get(asked, key) for key in (EVAL_EVERY, "train.checkpoint_every")}
    wanted |= {"train.max_steps": length, "train.time_budget_s": None}  # how long an evaluation takes is not known now
    config = configuration.with_values(_as_asked(run), wanted)
    machine = here(config.train.precision, config.train.threads)
    choices = Choices(config, trainable=run.trainable)
    set_intervals(choices, run.state.model.config, facts=facts_of(config, run.problem, run.base), machine=machine)
    return choices


def _as_asked(run: Run) -> Config:
    """The configuration of a run as one in which a key may be open."""
    return configuration.build(run.config.model_dump(mode="json", exclude_unset=True), "the run", Config)


def _new_length(run: Run, schedule: RunSchedule, asked: Config, limiting: set[str]) -> int:
    """The steps that the limits asked for now come to. Raises RunMismatch where they are done already."""
    values = {key: configuration.get(asked, key) for key in limiting}
    config = configuration.with_values(_as_asked(run), values | {key: None for key in LIMITS if key not in limiting})
    measured = measured_rows(run.start().batches, config)
    steps, reason = min(limits(config, measured))
    done = run.state.step
    if steps <= done and not (steps == done == schedule.length):
        raise RunMismatch(
            f"{reason}: the run has already done {plural(done, 'step')}, which makes {run.state.tokens:,} tokens"
        )
    return steps
