"""The learning-rate range test (Smith 2017, section 3.3): a short training in which the rate rises in equal ratios."""

import contextlib
import copy
import math
from dataclasses import dataclass
from typing import Any

import torch

from gptworks.core.config import with_values
from gptworks.core.errors import DataError, NotFinite, UsageError
from gptworks.core.log import console
from gptworks.core.runtime import interrupts, seed_everything
from gptworks.training.assemble import Run
from gptworks.training.loop import StepMetrics, run
from gptworks.training.optim import make_optimizers
from gptworks.training.problem import Work
from gptworks.training.schedule import RunSchedule
from gptworks.training.state import State

STEPS = 120
SPAN = (1e-3, 1e2)  # of the rate that the dial or the recipe has
BESIDE = 4  # losses on either side that a smoothed one is the mean of; one-sided, it would lag behind the rate
EXACT = 3.0  # the factor to which a scan tells a rate: one that is nearer stays (docs/log.md)
FLAT = 0.25  # of the steepest fall: where the loss falls less, a higher rate gains little and risks much


@dataclass(frozen=True)
class RangeTest:
    """The result of a range test: rates, losses and smoothed losses in nats, step by step, and what it proposes."""

    rates: list[float]
    losses: list[float]
    smoothed: list[float]
    lr: float
    adam_lr: float | None
    reason: str


def range_test(ready: Run) -> RangeTest:
    """Trains a copy of the model at rising rates; `ready` stays as it is. Raises DataError if no loss ever falls,
    UsageError without a rate to begin from."""
    train, (low, high) = ready.config.train, SPAN
    if not train.lr:
        raise UsageError("train.find_lr tries rates around train.lr, and that is 0: give one above it, or leave it out")
    settings: dict[str, Any] = {
        "train.lr": train.lr * high,
        "train.adam_lr": None if train.adam_lr is None else train.adam_lr * high,
        "train.max_steps": STEPS,
        "train.schedule": "range",
        "train.min_lr": low / high,
        "train.warmup": 0.0,
        "train.changes": [],
        "train.skip_spikes": None,
        "train.clip": 0.0,  # clipping would hide that a rate is too high
    }
    trial = with_values(ready.config, settings).train
    state = State(copy.deepcopy(ready.state.model), [])
    state.optimizers = make_optimizers(state.model, trial)
    work = ready.start(state)
    before = _losses_before(ready, work, state) if ready.base and work.batches.ahead else []
    rates: list[float] = []
    losses: list[float] = []

    def watch(state: State, m: StepMetrics) -> str | None:
        interrupts.check()
        rates.append(m.lr)
        losses.append(m.loss)
        console.live(f"range test  step {state.step}/{STEPS}  learning rate {m.lr:.2e}  loss {m.loss:.4f}")
        lately = losses[-2 * BESIDE :]
        return "diverged" if len(losses) > 10 and min(lately) > 1.5 * min(losses) else None

    with contextlib.suppress(NotFinite):  # the last rate was far too high: that is what we look for
        run(
            state, work.batches, work.objective, train=trial, layout=ready.layout, schedule=RunSchedule(trial),
            hooks=[watch],
        )  # fmt: skip
    console.clear()
    gained = [loss - was for loss, was in zip(losses, before, strict=False)] or losses
    smoothed = [_mean(gained[max(i - BESIDE, 0) : i + BESIDE + 1]) for i in range(len(gained))]
    if before:
        smoothed = [value + _mean(before) for value in smoothed]
    if len(smoothed) < 10 or min(smoothed) > smoothed[0] - 0.01:
        raise DataError(
            f"no loss fell at the rates that were tried, from {rates[0]:.2g} to {rates[-1]:.2g}, around "
            f"train.lr={train.lr:g}: leave train.lr out for a usual one, or look at the data"
        )
    bend, lr, adam_lr = _bend(smoothed), train.lr, train.adam_lr
    reason = (
        f"the loss falls steeply until {rates[bend]:.2g} and little beyond"
        if bend
        else f"the loss is still falling at {rates[-1]:.2g}, the end of the range: a higher rate may do better"
    )
    if bend and 1 / EXACT < rates[bend] / lr < EXACT:
        reason += f"; a scan is exact to a factor of {EXACT:g}, so that {lr:g} may stay"
    else:
        lr = _rounded(rates[bend or -1])
        adam_lr = adam_lr and _rounded(adam_lr * lr / train.lr)
    return RangeTest(rates, losses, smoothed=smoothed, lr=lr, adam_lr=adam_lr, reason=reason)


@torch.no_grad()
def _losses_before(ready: Run, work: Work, state: State) -> list[float]:
    """The loss of the model as it is on each batch of the scan.

    A trained model gains less in the scan than batches differ by: only what it gains on each tells one rate from
    another."""
    model, cursor, losses = state.model.to(ready.layout.device).train(), state.cursor, list[float]()
    model.dtype = ready.layout.dtype
    for step in range(STEPS):
        interrupts.check()
        console.live(f"range test  the model as it is, on batch {step + 1}/{STEPS}")
        batch, cursor = work.batches.take(cursor)
        total = 0.0
        for part in batch.rows(ready.layout.micro_batch):
            seed_everything(ready.config.train.seed, step, part.first)  # as the loop does, for dropout
            total += float(work.objective.loss(model, part.to(ready.layout.device)).sum)
        losses.append(total / work.objective.weight(batch))
    return losses


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def _bend(smoothed: list[float]) -> int | None:
    """The step from which the loss falls no more than FLAT of its steepest; None where it does so to the end.

    Where the lowest loss is says little: a network with norms does not diverge at a rate far too high, and its loss may
    go on falling slowly. What follows a loss higher than the first is chance.
    """
    above = (i for i, value in enumerate(smoothed) if value > smoothed[0] + 0.1 * (smoothed[0] - min(smoothed)))
    end = next(above, len(smoothed))
    falls = [smoothed[i - BESIDE] - smoothed[i + BESIDE] for i in range(BESIDE, end - BESIDE)]
    steepest = max(range(len(falls)), key=falls.__getitem__)
    flat = (i for i in range(steepest, len(falls)) if falls[i] < FLAT * falls[steepest])
    first = next(flat, None)
    return None if first is None and end == len(smoothed) else (end - 1 if first is None else first + BESIDE)


def _rounded(value: float) -> float:
    """Two significant digits: the test knows no more."""
    return float(f"{value:.2g}")
