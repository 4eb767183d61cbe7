"""Changes that a continued run makes from its present step on: longer, decaying now, at another rate, other values."""

from typing import Any

from gptworks.core import config as configuration
from gptworks.core.config import Change, Config, RunFile
from gptworks.core.errors import RunMismatch
from gptworks.core.log import plural
from gptworks.planning.choose import LIMITS, limits
from gptworks.training.assemble import Run
from gptworks.training.schedule import RunSchedule

# The flexible keys that the schedule itself knows a change of; any other is a value that holds from a step on.
OF_SCHEDULE = {**dict.fromkeys(LIMITS, "length"), "train.lr": "lr", "train.adam_lr": "adam_lr"}


def asked_change(run: Run, file: RunFile, asked: Config, different: list[tuple[str, Any, Any]]) -> Change | None:
    """The change that a continued run makes from its present step on, now that `flexible` keys `different` were asked
    for; None where there is none. Raises RunMismatch for what can no longer be had."""
    step, schedule = run.state.step, RunSchedule(run.config.train, file.changes)
    told, other, why = dict[str, Any](), dict[str, Any](), list[str]()
    limiting = {key for key, _, new in different if key in LIMITS and new is not None}
    for key, old, new in different:
        if key in OF_SCHEDULE:
            if new is None and not (key in LIMITS and limiting):
                raise RunMismatch(f"{key}={old} cannot be left open now: the run has begun; give a value")
            if key not in LIMITS:
                told[OF_SCHEDULE[key]] = new
        elif key == "train.decay_now":
            if not new:
                continue
        else:
            other[key] = new
        why.append(f"{key}={new}" if old is None else f"{key}={new}, was {old}")
    if limiting:
        told["length"] = _new_length(run, schedule, asked=asked, limiting=limiting)
    if asked.train.decay_now and any(key == "train.decay_now" for key, _, _ in different):
        if not 0 < step < schedule.length:
            raise RunMismatch(f"train.decay_now=true: the run stands at step {step} of {schedule.length}")
        decay = schedule.decay_from(step)
        return decay.model_copy(update=told | {"values": other, "why": "; ".join(why)})
    if told and "length" not in told and step == schedule.length:
        raise RunMismatch(f"{why[0]}: the run is finished at step {step}; ask for more steps, tokens or epochs with it")
    return Change(step=step, values=other, why="; ".join(why), **told) if why else None


def _new_length(run: Run, schedule: RunSchedule, asked: Config, limiting: set[str]) -> int:
    """The steps that the limits asked for now come to. Raises RunMismatch where they are done already."""
    values = {key: configuration.get(asked, key) for key in limiting}
    config = configuration.with_values(
        configuration.build(run.config.model_dump(mode="json", exclude_unset=True), "the run", Config),
        values | {key: None for key in LIMITS if key not in limiting},
    )
    rows = None
    if config.train.max_epochs and config.train.batch_tokens != "full":
        rows = run.start().batches.rows_in(config.train.max_epochs)
    steps, reason = min(limits(config, rows))
    done = run.state.step
    if steps <= done and not (steps == done == schedule.length):
        raise RunMismatch(
            f"{reason}: the run has already done {plural(done, 'step')}, which makes {run.state.tokens:,} tokens"
        )
    return steps
