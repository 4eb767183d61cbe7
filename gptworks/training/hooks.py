"""What happens beside the steps: a time budget, evaluation, logging, samples, checkpoints. Each is a hook of the loop.

The loop calls them in the order in which `train` lists them, which is part of what they do: a budget or an evaluation
may end the run, and what is logged, sampled and saved after it knows that.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gptworks.core.config import Change, ChosenGenerate, ChosenTrain, Generate
from gptworks.core.errors import NotFinite, Preempted, UsageError
from gptworks.core.failpoint import failpoint
from gptworks.core.folder import Verifying
from gptworks.core.log import console, count, duration
from gptworks.core.ranks import ranks
from gptworks.core.registry import class_of
from gptworks.core.runtime import interrupts, peak_memory
from gptworks.core.workers import side_by_side
from gptworks.data.batch import Batches
from gptworks.data.tokenizer import Tokenizer
from gptworks.infer.engine import Engine
from gptworks.infer.sampling import Sampling
from gptworks.infer.scoring import bits_per_byte
from gptworks.planning.budget import (
    MOST_PLANS,
    SAVING_SECONDS,
    SLOWER,
    Pace,
    planned_end,
    steps_until,
    with_evaluations,
)
from gptworks.planning.choices import Measured
from gptworks.planning.choose import EVALUATION_SHARE
from gptworks.training.loop import StepMetrics
from gptworks.training.metrics import Metrics
from gptworks.training.problem import Evaluation, Evaluator, Problem, check_names, checked
from gptworks.training.schedule import RunSchedule
from gptworks.training.state import Saving, State, Sums, using

# Of a time budget: over which the pace of steps is measured, and over which another pace is noticed; between two plans;
# at whose end any moment may have one.
LONG, SHORT, PLAN_APART, LATE = 0.12, 0.03, 0.015, 0.08
LEAST_SHORT, LEAST_APART = 0.4, 0.2  # seconds: over less, what else the system does is taken for the pace
PACE_SECONDS = 10  # over which the time that is left is reckoned
ANOTHER_PACE = 1.6  # times: between it and the same pace lies what a busy machine does from second to second
EVALUATION_DOUBTED = 0.1  # of the time that is left: an evaluation that seems to take more is timed again
EARLY_PLANS = 0.25  # of all plans, that may be made at the beginning; the others as the budget passes
# A plan may miss the end by this much of a time budget, and more for each plan before; or by this much of what is left.
TOLERANCE, TOLERANCE_MORE, TOLERANCE_LEFT = 0.02, 0.002, 0.1


class Logger:
    """Logs the first step and every `every` steps, and keeps the live line current."""

    def __init__(
        self, metrics: Metrics, every: int, schedule: RunSchedule, *,
        batches: Batches, bytes_per_token: float | None, lost_per_token: float = 0.0, flops: float, rate: float,
        to_come: Callable[[State], float] = lambda state: 0.0,
    ) -> None:  # fmt: skip
        """`flops` is what a token costs, `rate` the FLOP/s of the machine; bytes per token turn nats into bits.
        `to_come` gives the seconds that evaluations will still take."""
        self.to_come, self._pace = to_come, 0.0
        self.metrics, self.every, self.schedule, self.batches = metrics, every, schedule, batches
        self.bytes_per_token, self.lost_per_token = bytes_per_token, lost_per_token
        self.flops, self.rate = flops, rate
        self._said = 0.0

    def _bits(self, loss: float) -> float | None:
        """Bits a byte of text, where a token stands for text."""
        if self.bytes_per_token is None:
            return None
        return bits_per_byte(loss, self.bytes_per_token, self.lost_per_token)

    def __call__(self, state: State, m: StepMetrics) -> None:
        sums = state.unlogged
        # The pace of about the last PACE_SECONDS, since a machine may be faster or slower than it was.
        weight = 1 - math.exp(-m.seconds / PACE_SECONDS)
        self._pace = m.seconds if not self._pace else self._pace + weight * (m.seconds - self._pace)
        sums.seconds += m.seconds
        sums.data_seconds += m.data_seconds
        sums.weight += m.weight
        sums.tokens += m.tokens
        sums.loss += m.loss * m.weight
        for name, (total, weight) in m.figures.items():
            before = sums.figures.get(name, (0.0, 0.0))
            sums.figures[name] = (before[0] + total, before[1] + weight)
        loss, speed = sums.loss / sums.weight, sums.tokens / sums.seconds
        if console.terminal:
            console.live(self._line(state, loss, speed))
        ends = state.step == self.schedule.length or state.stopped
        if state.step % self.every and state.step != 1 and not ends:
            return
        scaled = state.model.dtype == torch.float16
        self.metrics.write(
            state.step,
            {
                "train/loss": loss,
                **({} if (bits := self._bits(loss)) is None else {"train/bits_per_byte": bits}),
                **{f"train/{name}": total / weight for name, (total, weight) in sums.figures.items() if weight},
                **({"train/grad_norm": m.grad_norm} if math.isfinite(m.grad_norm) else {}),
                "train/learning_rate": m.lr,
                "train/epoch": self.batches.epochs(state.cursor),
                "train/tokens": state.tokens,
                "train/tokens_per_second": speed,
                "train/mfu": speed * self.flops / self.rate,
                "train/data_wait": sums.data_seconds / sums.seconds,
                "train/seconds": state.seconds,
                "train/memory_gib": peak_memory() / 2**30,
                **({"train/skipped": state.skipped} if state.norms or scaled else {}),
                **({"train/loss_scale": state.scale} if scaled else {}),
            },
        )
        line = self._line(state, loss, speed)
        state.unlogged = Sums()
        last = state.step == self.schedule.length
        if time.perf_counter() - self._said > (10 if not console.terminal else 30) or last:
            self._said = time.perf_counter()
            console.say(line)

    def _line(self, state: State, loss: float, speed: float) -> str:
        total = self.schedule.length
        left = (total - state.step) * self._pace + self.to_come(state)
        per_byte = self._bits(loss)
        bits = "" if per_byte is None else f"{per_byte:.3f} bits/byte  "
        sums, waited = state.unlogged, state.unlogged.data_seconds / max(state.unlogged.seconds, 1e-9)
        figures = "".join(f"{name} {t / w:.4g}  " for name, (t, w) in sums.figures.items() if w)
        return (
            f"step {state.step:>{len(str(total))}}/{total}  loss {loss:.4f}  {bits}{figures}{count(speed)} tokens/s  "
            f"{speed * self.flops / self.rate:.0%} of matmul rate  data {waited:.1%}  "
            f"{duration(left)} left"
        )


class Evaluations:
    """Measures the model every so many steps; ends the run on a target, or when patience runs out."""

    def __init__(
        self, evaluate: Evaluator, problem: Problem, train: ChosenTrain, schedule: RunSchedule,
        metrics: Metrics | None = None, *, clock: Callable[[], float] = time.perf_counter,
        told: Callable[[float], None] = lambda seconds: None,
    ) -> None:  # fmt: skip
        """`metrics` is None where nothing is to be written: in a replay, and on all processes but the main one. `told`
        hears how many seconds of `clock` an evaluation took."""
        self.evaluate, self.problem, self.train, self.schedule = evaluate, problem, train, schedule
        self.metrics, self.clock, self.told = metrics, clock, told
        self.seconds = 0.0  # of the last evaluation
        self.last: tuple[int, Evaluation] | None = None

    def measure(self, state: State) -> Evaluation:
        """An evaluation of the weights, or of their average where one is kept; made once a step."""
        if self.last is None or self.last[0] != state.step:
            failpoint("eval.start")
            begun = self.clock()
            with using(state.model, state.average):
                self.last = (state.step, self._checked(state))
            self.seconds = self.clock() - begun
            self.told(self.seconds)
        return self.last[1]

    def seconds_to_come(self, state: State) -> float:
        """Seconds that the evaluations after this step will take, each as long as the last."""
        if state.step == self.schedule.length:
            return 0.0
        before = self.schedule.evaluations_before_the_last(state.step)
        return self.seconds * (1 if self.schedule.evaluations_left_out() else before + 1)

    def final(self, state: State) -> Evaluation:
        """The evaluation of the weights that the run gives: the best where they are kept, else those that `measure`
        takes."""
        if not state.best:
            return self.measure(state)
        with using(state.model, state.best):
            return self._checked(state)

    def _checked(self, state: State) -> Evaluation:
        """Raises UsageError where the watched figure is missing, NotFinite where a figure is not finite."""
        watched = self.problem.watched
        evaluation = checked(self.evaluate(state.model), Evaluation, class_of(self.evaluate))
        check_names(evaluation.figures, class_of(self.evaluate))
        if watched not in evaluation.figures:
            raise UsageError(
                f"{class_of(self.problem)} watches {watched!r}, and its evaluation has "
                f"{', '.join(evaluation.figures) or 'no figure'}"
            )
        figures = self._numbers(evaluation.figures, state.step)
        logged = None if evaluation.logged is None else self._numbers(evaluation.logged, state.step)
        figures = ranks.agree(figures)  # what ends a run has to end it in every process
        return replace(evaluation, figures=figures, logged=logged)

    def _numbers(self, figures: dict[str, float], step: int) -> dict[str, float]:
        """Figures as plain floats, whatever kind of number they were."""
        numbers: dict[str, float] = {}
        for name, value in figures.items():
            if isinstance(value, bool | str) or not hasattr(value, "__float__"):
                raise UsageError(f"{class_of(self.evaluate)}: the figure {name!r} is {value!r} and not a number")
            numbers[name] = float(value)
            if not math.isfinite(numbers[name]):
                raise NotFinite(f"step {step}: the evaluation's {name} is {value}; nothing of it was written")
        return numbers

    def _log(self, state: State, evaluation: Evaluation) -> None:
        if not self.metrics:
            return
        total = self.schedule.length
        logged = evaluation.figures if evaluation.logged is None else evaluation.logged
        values = {f"eval/{name}": value for name, value in logged.items()}
        self.metrics.write(state.step, {**values, "train/tokens": state.tokens, "train/seconds": state.seconds})
        console.say(f"step {state.step:>{len(str(total))}}/{total}  eval {'  '.join(evaluation.shown)}")

    def before_training(self, state: State) -> None:
        """Measures the model that a run starts from, to show what the run gains. It is logged as that of step 0, and is
        no candidate for the best weights."""
        self._log(state, self.measure(state))

    def __call__(self, state: State, m: StepMetrics) -> str | None:
        if not self.schedule.evaluates(state.step):
            return None
        evaluation = self.measure(state)
        self._log(state, evaluation)
        watched, best = evaluation.figures[self.problem.watched], state.best_figure
        if best is None or (watched < best if self.problem.lower_is_better else watched > best):
            state.best_figure, state.evals_since_best = watched, 0
            if self.train.patience is not None:
                with using(state.model, state.average):
                    state.best = {name: p.detach().to("cpu", copy=True) for name, p in state.trained().items()}
        else:
            state.evals_since_best += 1
        target = self.train.target_loss
        if target is not None and evaluation.figures.get("loss", math.inf) <= target:
            return f"reached train.target_loss={target}"
        if self.train.patience is not None and state.evals_since_best >= self.train.patience:
            return f"no improvement in {state.evals_since_best} evaluations (train.patience)"
        return None


class Sampler:
    """A sample of text now and then, so that a person sees the model learn."""

    def __init__(
        self, metrics: Metrics, tokenizer: Tokenizer, stop_ids: tuple[int, ...], *,
        options: ChosenGenerate, train: ChosenTrain, schedule: RunSchedule,
    ) -> None:  # fmt: skip
        self.metrics, self.tokenizer, self.stop_ids = metrics, tokenizer, stop_ids
        self.options, self.train, self.schedule = options, train, schedule

    def __call__(self, state: State, m: StepMetrics) -> None:
        if not any(self.schedule.reaches(state.step, share) for share in (0.1, 0.3, 1.0)) or not self.options.prompts:
            return
        engine = Engine(state.model, self.tokenizer, self.stop_ids)
        prompt, how = self.options.prompts[0], sampling(self.options, self.train.seed)
        with using(state.model, state.average), side_by_side(self.train.workers):
            # Where all threads share each small product, beside other work 60 tokens took 20 s.
            result = engine.generate(prompt, how, min(60, self.options.max_new_tokens))
        self.metrics.text(state.step, "sample", prompt + result.text)


def sampling(options: Generate, seed: int | None) -> Sampling:
    """The sampling that a recipe's `generate` section asks for."""
    return Sampling(
        options.repetition_penalty,
        options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        seed=seed,
    )


class TimeBudget:
    """Plans a run with a time budget anew as its pace changes, so that it ends when it was told to.

    A new plan changes how many steps are left, and with that how fast the schedule's share is passed; evaluations that
    nobody asked for are left out before steps are. What is decided goes into config.yaml through `record`, from where a
    resume or a replay reads it; a run that was interrupted keeps its plan.
    """

    def __init__(
        self, train: ChosenTrain, schedule: RunSchedule, *, measured: Measured | None, most: int | None,
        may_leave_out: bool, from_step: int, record: Callable[[Change], None], clock: Callable[[], float],
        evaluation_now: Callable[[], float],
    ) -> None:  # fmt: skip
        """`measured` and `most`, the steps that all other limits allow, are None where the plan is an earlier
        process's; `may_leave_out` says that nobody asked for evaluations on the way; `clock` gives the seconds since
        the command began; `evaluation_now` the seconds that an evaluation would take, by computing a part of one."""
        self.evaluation_now = evaluation_now
        self.train, self.schedule, self.may_leave_out = train, schedule, may_leave_out
        self.budget, self.record, self.clock = train.time_budget_s or 0.0, record, clock
        self.measured, self.most = measured, most
        self.active = bool(self.budget) and measured is not None and most is not None and not from_step
        self.recent: deque[float] = deque()  # seconds of the last steps
        self.recent_sum = 0.0
        self.evaluating = 0.0  # seconds of an evaluation since the last step
        # Steps that an evaluation takes the time of: on a slower machine both take longer.
        self.evaluation_steps = measured.eval_seconds / max(measured.step_seconds, 1e-9) if measured else 0.0
        self.short, self.long = max(SHORT * self.budget, LEAST_SHORT), LONG * self.budget
        self.apart = max(PLAN_APART * self.budget, LEAST_APART)
        self.last = self.planned_at = clock()

    def time_evaluation(self, seconds: float) -> None:
        """Hears how long an evaluation took, which is no part of a step."""
        self.evaluating = seconds

    def _step_seconds(self) -> float:
        """The mean of the last steps but the longest, which a sample, a checkpoint or the system may have made so; of
        the very last ones, where they have another pace than those before."""
        last = _last_of(self.recent, self.short)
        pace, pace_now = _mean_but_longest(self.recent), _mean_but_longest(last)
        if 1 / ANOTHER_PACE < pace_now / pace < ANOTHER_PACE:
            return pace
        self.recent, self.recent_sum = deque(last), sum(last)
        return pace_now

    def __call__(self, state: State, m: StepMetrics) -> None:
        if not self.active:
            return
        now = self.clock()
        spent = now - self.last - self.evaluating
        if self.evaluating and state.step > 1:
            # The pace may have changed before the evaluation or after it: the step that fits better was at its pace.
            beside = [self.evaluating / max(step, 1e-9) for step in (spent, *list(self.recent)[-1:])]
            self.evaluation_steps = min(beside, key=lambda steps: abs(steps - self.evaluation_steps))
        self.last, self.evaluating = now, 0.0
        if state.step == 1:
            return  # it has what is compiled and allocated once
        self.recent.append(max(spent, 1e-9))
        self.recent_sum += self.recent[-1]
        while len(self.recent) > 2 and self.recent_sum > self.long:
            self.recent_sum -= self.recent.popleft()
        if len(self.recent) < 2:
            return
        if ranks.world > 1 and state.step % max(self.schedule.planned // 200, 1):
            return  # agreeing takes the processes a moment
        if change := ranks.agree(self._plan(state.step, now)):
            self.record(change)

    def _plan(self, step: int, now: float) -> Change | None:
        """Another plan where this one misses the budget by more than is worth one, more with each plan before."""
        assert self.measured and self.most
        planned_seconds = self.measured.step_seconds
        plans = [change for change in self.schedule.changes if change.pace]
        may_be_made = MOST_PLANS * min(EARLY_PLANS + (1 - EARLY_PLANS) * now / self.budget, 1.0)
        if len(plans) >= may_be_made or any(not change.pace for change in self.schedule.changes):
            return None
        if now - self.planned_at < self.apart and now < (1 - LATE) * self.budget:
            return None  # the pace that it was made by is not yet known any better
        seconds, length = self._step_seconds(), self.schedule.length
        evaluated = not self.schedule.evaluations_left_out()
        to_come = self.schedule.evaluations_before_the_last(step, in_steps=not self.may_leave_out)

        def missed() -> tuple[float, float, Pace]:
            """Gives how far the plan's end is from the one to be planned for, that one, and the pace of now."""
            slower = max(seconds / max(planned_seconds, 1e-9), 1.0)
            pace = Pace(seconds, self.evaluation_steps * seconds, SAVING_SECONDS * slower)
            end = planned_end(self.budget, pace, max(SLOWER / slower, 1.0))
            left = (length - step) * seconds + evaluated * to_come * pace.evaluation + pace.finish
            return now + left - end, end, pace

        miss, end, pace = missed()
        doubted = miss > 0 and pace.evaluation > EVALUATION_DOUBTED * (end - now) and now < (1 - LATE) * self.budget
        if (
            doubted and ranks.world == 1
        ):  # of several, each makes a plan of its own, and an evaluation may need them all
            # So much of what is left is not given up for an estimate that a busy moment may have made.
            self.evaluation_steps = min(self.evaluation_steps, self.evaluation_now() / seconds)
            miss, end, pace = missed()
        if abs(miss) <= max(self.budget * (TOLERANCE + TOLERANCE_MORE * len(plans)), TOLERANCE_LEFT * (end - now)):
            return None
        # Those that nobody asked for go before steps do, and come back where there is time for them again.
        share = to_come * pace.evaluation / max(end - now, 1e-9)
        makes = not self.may_leave_out or share <= 2 * EVALUATION_SHARE * (1.0 if evaluated else 0.5)
        if self.may_leave_out:
            fitting = steps_until(end, now, pace=pace, evaluations=makes * to_come)
        else:  # each so many steps, however many there will be
            fitting = steps_until(end, now, pace=with_evaluations(pace, self.train.eval_every), evaluations=0)
        steps = min(step + fitting, self.most)
        if steps == length and makes == evaluated:
            return None
        why = f"{steps} steps fit into train.time_budget_s={self.budget:g}, not {length}"
        if evaluated and not makes:
            why += ", without evaluations before the last"
        self.planned_at = now
        console.say(f"step {step}: {why}")
        return Change(step=step, length=steps, pace=True, evaluations=makes, in_steps=not self.may_leave_out, why=why)


def _last_of(steps: Sequence[float], seconds: float) -> list[float]:
    """The last steps that took about so many seconds together, two at least."""
    last, together = 0, 0.0
    for step in reversed(steps):
        if last >= 2 and together + step > seconds:
            break
        last, together = last + 1, together + step
    return list(steps)[len(steps) - last :]


def _mean_but_longest(steps: Sequence[float]) -> float:
    return (sum(steps) - max(steps)) / (len(steps) - 1)


class Checkpointer:
    """Saves every `every` steps and at the end, beside the training; on a signal, saves and leaves with Preempted."""

    def __init__(
        self, path: Path, every: int, schedule: RunSchedule, facts: Callable[[], dict[str, Any]], *,
        verifying: Verifying | None = None, asked: bool = False,
    ) -> None:  # fmt: skip
        """`asked` says that a person asked for `every`, which then counts the steps of the run as it is run.
        `verifying` is the data that is still compared with its hashes; nothing that was learned from it is kept before
        that has ended, on any machine."""
        self.path, self.every, self.schedule, self.facts = path, every, schedule, facts
        self.saving: Saving | None = None
        self.verifying, self.verified, self.asked = verifying, False, asked

    def __call__(self, state: State, m: StepMetrics) -> None:
        stop = ranks.total(bool(interrupts.requested))[0] > 0  # all processes leave at the same step
        if self.verifying and self.verifying.ended:
            self.verifying.finish()
        if stop or state.stopped or self.schedule.due(state.step, self.every, in_steps=self.asked):
            if not self.verified:
                if self.verifying:
                    self.verifying.finish()
                ranks.barrier()
                self.verified = True
            self.finish()
            if ranks.main:
                self.saving = Saving(state, self.path, self.facts())
                self.saving.start()
        elif self.saving and not self.saving.is_alive():
            self.finish()
        if stop:
            self.finish()
            ranks.barrier()
            raise Preempted(
                f"stopped by {interrupts.requested or 'a signal to another process'} at step {state.step}; "
                "saved, run the same command to continue"
            )

    def finish(self) -> None:
        """Waits for the checkpoint in the making, and raises what went wrong with it."""
        if self.saving:
            saving, self.saving = self.saving, None
            saving.finish()
