"""Measurements that need the text and a clock, before step one: rows in the epochs asked for, seconds of a step."""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace

from gptworks.core.config import Config
from gptworks.core.log import console
from gptworks.core.runtime import interrupts
from gptworks.data.batch import Batches
from gptworks.model.transformer import Transformer
from gptworks.planning.choices import Measured
from gptworks.planning.choose import step_tokens
from gptworks.training.assemble import Run, trial_of
from gptworks.training.loop import StepMetrics
from gptworks.training.loop import run as train
from gptworks.training.problem import Evaluator, Work
from gptworks.training.schedule import RunSchedule
from gptworks.training.state import State

ENOUGH_SECONDS = 1.0  # of steps: the plan that is made of them is changed by the run's own pace


def measure(run: Run, work: Work, clock: Callable[[], float]) -> Measured:
    """Counts rows, and where there is a time budget times a few steps and a part of an evaluation. `clock` gives the
    seconds since the command began."""
    options, counted = run.config.train, measured_rows(work.batches, run.config)
    if not options.time_budget_s:
        return counted
    timed = timings(run)
    return replace(
        counted,
        step_seconds=timed.step_seconds,
        step_tokens=timed.step_tokens,
        eval_seconds=timed.eval_seconds,
        left_seconds=options.time_budget_s - clock(),
    )


def timings(run: Run) -> Measured:
    """Times a few steps and a part of an evaluation on a copy of the model."""
    console.live("timing a few steps")
    trial = trial_of(run)
    work = run.start(trial)
    times: list[float] = []
    evaluations: list[float] = []
    began = time.perf_counter()

    def timer(state: State, m: StepMetrics) -> str | None:
        """Times every second step, and after it a part of an evaluation, so that a busy moment makes both slow. The
        step after that has its memory to allocate again, which no step of the run has."""
        interrupts.check()
        times.append(m.seconds)
        if len(times) % 2:
            return None
        if not evaluations:
            evaluation_seconds(work.evaluate, state.model)  # which has what is allocated once
        evaluations.append(evaluation_seconds(work.evaluate, state.model))
        return "timed" if time.perf_counter() - began > ENOUGH_SECONDS else None

    options = run.config.train
    endless = RunSchedule(options.model_copy(update={"max_steps": 10**9}), [])
    layout = replace(run.layout, compile=False)
    train(trial, work.batches, work.objective, train=options, layout=layout, schedule=endless, hooks=[timer])
    return Measured(
        step_seconds=statistics.median(times[1::2]),
        step_tokens=step_tokens(run.config, run.problem.epoch_tokens),
        eval_seconds=statistics.median(evaluations),
    )


def measured_rows(batches: Batches, config: Config) -> Measured:
    """Counts the rows that epochs come to, and how full rows are where tokens are counted."""
    train = config.train
    rows = batches.rows_in(train.max_epochs) if train.max_epochs and train.batch_tokens != "full" else None
    return Measured(rows, fill=batches.fill if train.max_tokens else 1.0)


def evaluation_seconds(evaluate: Evaluator, model: Transformer) -> float:
    """The seconds that an evaluation takes, by a part of one."""
    began = time.perf_counter()
    share = evaluate.part(model)
    return (time.perf_counter() - began) / share
