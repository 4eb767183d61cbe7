"""The rate of a run at each step and its length, as planned and as changed on the way.

A schedule maps the share of the run that is done to a factor of the peak rate, so it holds no state; nor does a
RunSchedule, which is a function of the configuration with the changes written into it.
"""

import math

from gptworks.core.config import Change, ChosenTrain, Train
from gptworks.core.registry import resolve

SCHEDULES = {
    "constant": "gptworks.training.schedule:constant",
    "linear": "gptworks.training.schedule:linear",
    "cosine": "gptworks.training.schedule:cosine",
    "step": "gptworks.training.schedule:step",
    "inverse_sqrt": "gptworks.training.schedule:inverse_sqrt",
    "wsd": "gptworks.training.schedule:wsd",
    "range": "gptworks.training.schedule:range_test",
}


EVAL_EVERY = "train.eval_every"


class RunSchedule:
    """The length, the rates and the intervals of one run.

    A change of length or a decay bends the schedule: the rate goes on from where it stands, so there is no jump. A
    decay falls from there as 1 - sqrt(share); otherwise the rate moves in a straight line, over the share of a
    warm-up and at least 2 %, to what the schedule says for the new length. A new `lr` holds at once, as it is meant to.
    """

    def __init__(self, train: ChosenTrain, changes: list[Change] | None = None) -> None:
        """`train` is as the run began. `changes` is read and not copied: what is appended to the list holds at once.
        None: those of `train`."""
        self.train, self.planned = train, train.max_steps
        self.changes = train.changes if changes is None else changes

    @property
    def length(self) -> int:
        """Steps in the whole run."""
        return next((c.length for c in reversed(self.changes) if c.length), self.planned)

    def factor(self, step: int) -> float:
        """The share of the peak rate at step 0 .. length-1."""
        bends = [c for c in self.changes if c.step <= step and (c.length or c.decay) and not c.pace]
        return self._factor(step, bends)

    def _factor(self, step: int, bends: list[Change]) -> float:
        if not bends:
            return rate_factor(self._planned_step(step), self.planned, self.train)
        last, floor = bends[-1], self.train.min_lr
        length = next((c.length for c in reversed(bends) if c.length), self.planned)
        came = self._factor(last.step - 1, bends[:-1]) if last.step else rate_factor(0, length, self.train)
        if last.decay:
            share = min((step - last.step) / max(length - last.step, 1), 1.0)
            return floor + (came - floor) * (1 - math.sqrt(share))
        rise = math.ceil(max(self.train.warmup or 0.0, 0.02) * max(length - last.step, 0)) if last.step else 0
        share = min((step - last.step + 1) / (rise + 1), 1.0)
        planned = rate_factor(step, length, self.train)
        return planned if share == 1.0 else came + (planned - came) * share

    def _planned_step(self, step: int) -> float:
        """The step of the first plan at which the run stands: by a new pace it passes the rest of the plan faster or
        slower, so that rates and intervals are those of the same share of the run. Whole without a new pace."""
        begin, done, length = 0, 0.0, self.planned
        for change in self.changes:
            if change.pace and change.length and change.step < step:
                done += (change.step - begin) * (self.planned - done) / max(length - begin, 1)
                begin, length = change.step, change.length
        if not begin:
            return step
        return min(done + (step - begin) * (self.planned - done) / max(length - begin, 1), self.planned)

    def planned_left(self, step: int) -> float:
        """Steps of the first plan that are still to be passed."""
        return self.planned - self._planned_step(step)

    def peaks(self, step: int) -> dict[str, float]:
        """The peak rates that were changed up to a step: `lr`, `adam_lr`."""
        rates: dict[str, float] = {}
        for change in self.changes:
            if change.step <= step:
                rates |= {name: value for name in ("lr", "adam_lr") if (value := getattr(change, name)) is not None}
        return rates

    def due(self, step: int, every: int, in_steps: bool = False) -> bool:
        """True where an interval of `every` steps ends, or the run.

        A new pace makes the intervals of the rest of a plan longer or shorter, so that there are as many, unless they
        were asked for `in_steps`. After a length that a person asked for, a step is a step again.
        """
        if step == self.length:
            return True
        if in_steps or self._longer_by_hand(step):
            return step % every == 0
        return self._share_ends(step, every)

    def _longer_by_hand(self, step: int) -> Change | None:
        """The latest change of length before a step that no clock made."""
        by_hand = (c for c in reversed(self.changes) if c.length and not (c.pace or c.stretch) and c.step < step)
        return next(by_hand, None)

    def _share_ends(self, step: int, every: int) -> bool:
        """True where `every` steps of the first plan are passed. What ended before a new plan does not end again."""

        def ended(by: int, length: int) -> int:
            if any(change.pace for change in self.changes):
                return math.floor(self._planned_step(by) / every + 1e-9)
            return by * self.planned // (every * length)

        most, length = 0, self.planned
        for change in self.changes:
            if change.stretch and change.length and change.step < step:
                most, length = max(most, ended(change.step, length)), change.length
        return ended(step, length) > max(most, ended(step - 1, length))

    def eval_every(self, step: int) -> int:
        """The steps between evaluations that hold for a step."""
        return self._told_every(step) or self.train.eval_every

    def _told_every(self, step: int) -> int | None:
        """The steps between evaluations by a change before a step; None where no change has said so."""
        told = (c.values[EVAL_EVERY] for c in reversed(self.changes) if c.step < step and EVAL_EVERY in c.values)
        return next(told, None)

    def _latest_pace(self, step: int) -> Change | None:
        return next((c for c in reversed(self.changes) if c.pace and c.step < step), None)

    def evaluates(self, step: int) -> bool:
        """True where an evaluation is due that no new pace has left out; the last never is."""
        every, pace = self.eval_every(step), self._latest_pace(step)
        if step == self.length or self._told_every(step) or (pace and pace.in_steps):
            return step == self.length or step % every == 0
        return self._share_ends(step, every) and (pace is None or pace.evaluations)

    def evaluations_before_the_last(self, step: int, in_steps: bool = False) -> int:
        """Evaluations that are still to come by the plan, whether or not a pace leaves them out; `in_steps` where they
        were asked for so."""
        every, pace = self.eval_every(step + 1), self._latest_pace(step + 1)
        if in_steps or self._told_every(step + 1) or (pace and pace.in_steps):
            return (self.length - 1) // every - step // every
        return max(math.ceil(self.planned_left(step) / every) - 1, 0)

    def evaluations_left_out(self) -> bool:
        """True where the latest pace leaves out all evaluations but the last."""
        latest = next((change for change in reversed(self.changes) if change.pace), None)
        return latest is not None and not latest.evaluations

    def reaches(self, step: int, share: float) -> bool:
        """True at the first step at which so large a share of the run is done, as long as it is by then."""
        if longer := self._longer_by_hand(step):
            return step == max(round(share * (longer.length or 0)), 1) or (share == 1 and step == self.length)
        wanted = max(round(share * self.planned), 1) - 1e-9
        return self._planned_step(step - 1) < wanted <= self._planned_step(step) or (share == 1 and step == self.length)

    def decay_from(self, step: int) -> Change:
        """The decay that begins now: as long, beside what came before, as a planned one; never beyond the end."""
        share = min(self.train.cooldown, 0.99) or 0.5
        steps = max(round(step * share / (1 - share)), 1)
        return Change(
            step=step, length=min(step + steps, max(self.length, step + 1)), decay=True, why="train.decay_now"
        )


# -- schedules ---------------------------------------------------------------------------------------------------


def rate_factor(step: float, total: int, train: Train) -> float:
    """The factor of the peak rate for step 0 .. total-1: a linear warm-up, then the schedule's own shape.

    A step between two whole ones is that of a run whose pace has changed."""
    warmup = round((train.warmup or 0.0) * total)
    schedule = resolve("schedule", SCHEDULES, train.schedule)
    rise = min((step + 1) / (warmup + 1), 1.0)
    return rise * schedule(step, total, warmup, train)


def constant(step: float, total: int, warmup: int, train: Train) -> float:
    return 1.0


def _done(step: float, total: int, warmup: int) -> float:
    """Share of the steps after warm-up that are done, 0 to 1."""
    return min(max((step - warmup) / max(total - warmup, 1), 0.0), 1.0)


def linear(step: float, total: int, warmup: int, train: Train) -> float:
    return 1 - (1 - train.min_lr) * _done(step, total, warmup)


def cosine(step: float, total: int, warmup: int, train: Train) -> float:
    """Half a cosine from the peak to min_lr (Loshchilov and Hutter 2017)."""
    return train.min_lr + (1 - train.min_lr) * 0.5 * (1 + math.cos(math.pi * _done(step, total, warmup)))


def step(step: float, total: int, warmup: int, train: Train) -> float:
    """A factor `step_gamma` after each `step_every` of the run."""
    share = step / max(total, 1)
    drops = int(share / train.step_every + 1e-9) if train.step_every else 0  # 0.3 / 0.1 is just below 3
    return max(train.step_gamma**drops, train.min_lr)


def inverse_sqrt(step: float, total: int, warmup: int, train: Train) -> float:
    """1/sqrt(step) after the warm-up (Vaswani et al. 2017, section 5.3)."""
    return max(math.sqrt(max(warmup, 1) / max(step, warmup, 1)), train.min_lr)


def range_test(step: float, total: int, warmup: int, train: Train) -> float:
    """The factor rises from `min_lr` to 1 in equal ratios (Smith 2017)."""
    return max(train.min_lr, 1e-9) ** (1 - step / max(total - 1, 1))


def wsd(step: float, total: int, warmup: int, train: Train) -> float:
    """Warm-up, stable, decay: flat, then 1 - sqrt(share) over the cooldown (Hägele et al. 2024)."""
    cooldown = round(train.cooldown * total)
    into = (step - (total - cooldown)) / max(cooldown, 1)
    return 1.0 if into <= 0 else train.min_lr + (1 - train.min_lr) * (1 - math.sqrt(into))
