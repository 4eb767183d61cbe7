"""What happens beside the steps: evaluation, logging, samples, a time budget, checkpoints. Each is a hook of the loop.

The loop calls them in the order in which `session` lists them, which is part of what they do: an evaluation may end the
run, and what is logged, sampled and saved after it knows that.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gptworks.core.config import Change, ChosenTrain, Generate
from gptworks.core.errors import NotFinite, Preempted, UsageError
from gptworks.core.failpoint import failpoint
from gptworks.core.log import console, count, duration
from gptworks.core.ranks import ranks
from gptworks.core.runtime import interrupts, peak_memory
from gptworks.data.batch import Batches
from gptworks.data.tokenizer import Tokenizer
from gptworks.infer.engine import Engine
from gptworks.infer.sampling import Sampling
from gptworks.training.loop import StepMetrics
from gptworks.training.metrics import Metrics
from gptworks.training.problem import Evaluation, Evaluator, Problem
from gptworks.training.schedule import RunSchedule, flat_share
from gptworks.training.state import Saving, State, using


class Logger:
    """Logs every `every` steps, and keeps the live line current."""

    def __init__(
        self, metrics: Metrics, every: int, schedule: RunSchedule, *,
        batches: Batches, bytes_per_token: float | None, flops: float, rate: float,
    ) -> None:  # fmt: skip
        """`flops` is what a token costs, `rate` the FLOP/s of the machine; bytes per token turn nats into bits."""
        self.metrics, self.every, self.schedule, self.batches = metrics, every, schedule, batches
        self.to_bits = None if bytes_per_token is None else 1 / math.log(2) / bytes_per_token
        self.flops, self.rate = flops, rate
        self._clear()
        self._said = 0.0

    def _clear(self) -> None:
        self._seconds = self._data = self._weight = self._loss = 0.0
        self._tokens = 0
        self._figures: dict[str, tuple[float, float]] = {}

    def __call__(self, state: State, m: StepMetrics) -> None:
        self._seconds += m.seconds
        self._data += m.data_seconds
        self._weight += m.weight
        self._tokens += m.tokens
        self._loss += m.loss * m.weight
        for name, (total, weight) in m.figures.items():
            before = self._figures.get(name, (0.0, 0.0))
            self._figures[name] = (before[0] + total, before[1] + weight)
        if state.step % self.every and state.step != self.schedule.length and not state.stopped:
            return
        loss = self._loss / self._weight
        speed, scaled = self._tokens / self._seconds, state.model.dtype == torch.float16
        self.metrics.write(
            state.step,
            {
                "train/loss": loss,
                **({} if self.to_bits is None else {"train/bits_per_byte": loss * self.to_bits}),
                **{f"train/{name}": total / weight for name, (total, weight) in self._figures.items() if weight},
                **({"train/grad_norm": m.grad_norm} if math.isfinite(m.grad_norm) else {}),
                "train/learning_rate": m.lr,
                "train/epoch": self.batches.epochs(state.cursor),
                "train/tokens": state.tokens,
                "train/tokens_per_second": speed,
                "train/mfu": speed * self.flops / self.rate,
                "train/data_wait": self._data / self._seconds,
                "train/seconds": state.seconds,
                "train/memory_gib": peak_memory() / 2**30,
                **({"train/skipped": state.skipped} if state.norms or scaled else {}),
                **({"train/loss_scale": state.scale} if scaled else {}),
            },
        )
        line = self._line(state, loss, speed)
        self._clear()
        if console.terminal:
            console.live(line)
        last = state.step == self.schedule.length
        if time.perf_counter() - self._said > (10 if not console.terminal else 30) or last:
            self._said = time.perf_counter()
            console.say(line)

    def _line(self, state: State, loss: float, speed: float) -> str:
        total = self.schedule.length
        left = (total - state.step) * state.seconds / state.step
        bits = "" if self.to_bits is None else f"{loss * self.to_bits:.3f} bits/byte  "
        figures = "".join(f"{name} {t / w:.4g}  " for name, (t, w) in self._figures.items() if w)
        return (
            f"step {state.step:>{len(str(total))}}/{total}  loss {loss:.4f}  {bits}{figures}{count(speed)} tokens/s  "
            f"{speed * self.flops / self.rate:.0%} of matmul rate  data {self._data / max(self._seconds, 1e-9):.1%}  "
            f"{duration(left)} left"
        )


class Evaluations:
    """Measures the model every so many steps; ends the run on a target, or when patience runs out."""

    def __init__(
        self, evaluate: Evaluator, problem: Problem, train: ChosenTrain, schedule: RunSchedule,
        metrics: Metrics | None = None,
    ) -> None:  # fmt: skip
        """`metrics` is None where nothing is to be written: in a replay, and on all processes but the main one."""
        self.evaluate, self.problem, self.train, self.schedule = evaluate, problem, train, schedule
        self.metrics = metrics
        self.last: tuple[int, Evaluation] | None = None

    def measure(self, state: State) -> Evaluation:
        """An evaluation of the weights, or of their average where one is kept; made once a step."""
        if self.last is None or self.last[0] != state.step:
            failpoint("eval.start")
            with using(state.model, state.average):
                self.last = (state.step, self._checked(state))
        return self.last[1]

    def final(self, state: State) -> Evaluation:
        """That of the weights that the run gives: the best where they are kept, else as `measure`."""
        if not state.best:
            return self.measure(state)
        with using(state.model, state.best):
            return self._checked(state)

    def _checked(self, state: State) -> Evaluation:
        """Raises UsageError where the watched figure is missing, NotFinite where a figure is not finite."""
        evaluation, watched = self.evaluate(state.model), self.problem.watched
        if watched not in evaluation.figures:
            raise UsageError(
                f"{type(self.problem).__name__} watches {watched!r}, and its evaluation has "
                f"{', '.join(evaluation.figures) or 'no figure'}"
            )
        for name, value in evaluation.figures.items():
            if not math.isfinite(value):
                raise NotFinite(f"step {state.step}: the evaluation's {name} is {value}; nothing of it was written")
        return evaluation

    def __call__(self, state: State, m: StepMetrics) -> str | None:
        if not self.schedule.due(state.step, self.train.eval_every):
            return None
        evaluation, total = self.measure(state), self.schedule.length
        if self.metrics:
            logged = evaluation.figures if evaluation.logged is None else evaluation.logged
            values = {f"eval/{name}": value for name, value in logged.items()}
            self.metrics.write(state.step, {**values, "train/tokens": state.tokens, "train/seconds": state.seconds})
            console.say(f"step {state.step:>{len(str(total))}}/{total}  eval {'  '.join(evaluation.shown)}")
        found, best = evaluation.figures[self.problem.watched], state.best_figure
        if best is None or (found < best if self.problem.lower_is_better else found > best):
            state.best_figure, state.evals_since_best = found, 0
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
        options: Generate, seed: int, schedule: RunSchedule,
    ) -> None:  # fmt: skip
        self.metrics, self.tokenizer, self.stop_ids = metrics, tokenizer, stop_ids
        self.options, self.seed, self.schedule = options, seed, schedule

    def __call__(self, state: State, m: StepMetrics) -> None:
        steps = {max(round(self.schedule.length * share), 1) for share in (0.1, 0.3, 1.0)}
        if state.step not in steps or not self.options.prompts:
            return
        engine = Engine(state.model, self.tokenizer, self.stop_ids)
        prompt, how = self.options.prompts[0], sampling(self.options, self.seed)
        with using(state.model, state.average):
            result = engine.generate(prompt, how, min(60, self.options.max_new_tokens))
        self.metrics.text(state.step, "sample", prompt + result.text)


def sampling(options: Generate, seed: int | None) -> Sampling:
    """The sampling that a recipe's `generate` section asks for."""
    return Sampling(options.repetition_penalty, options.temperature, options.top_k, options.top_p, options.min_p, seed)


class TimeBudget:
    """Plans a run with a time budget anew while its learning rate is flat, from the pace so far.

    A machine is rarely as fast as in the seconds it was timed. What is decided goes into config.yaml through `record`,
    from where a resume or a replay reads it; a run that was interrupted keeps its plan.
    """

    def __init__(
        self, train: ChosenTrain, schedule: RunSchedule, *, most: int | None, eval_seconds: float, from_step: int,
        record: Callable[[Change], None], clock: Callable[[], float],
    ) -> None:  # fmt: skip
        """`most` steps fit into all other limits, None where the plan is an earlier process's; `clock` gives the
        seconds since the command began."""
        self.train, self.schedule, self.most, self.every = train, schedule, most, train.checkpoint_every
        self.eval_seconds, self.evaluated, self.first = eval_seconds, 0, 0.0
        self.record, self.from_step, self.clock, self.started = record, from_step, clock, clock()

    def __call__(self, state: State, m: StepMetrics) -> None:
        flat = flat_share(self.train)
        self.first = self.first or m.seconds  # with what is compiled and allocated once
        self.evaluated += self.schedule.due(state.step, self.train.eval_every)
        if (
            self.from_step
            or not self.train.time_budget_s
            or any(not change.stretch for change in self.schedule.changes)
            or state.step >= flat * self.schedule.length
            or not self.schedule.due(state.step, self.every)
        ):
            return
        if change := ranks.agree(self._decide(state, flat)):
            self.record(change)

    def _decide(self, state: State, flat: float) -> Change | None:
        train, length = self.train, self.schedule.length
        assert train.time_budget_s
        if self.most is None or state.step == 1:
            return None
        spent = self.clock() - self.started - self.eval_seconds * self.evaluated
        pace = (max(spent, state.seconds) - self.first) / (state.step - 1)  # with samples and checkpoints
        # As many evaluations as planned, however long the run gets: their distance stretches with it.
        to_come = max(math.ceil(self.schedule.planned / train.eval_every) - self.evaluated, 1)
        left = train.time_budget_s - self.clock() - 2.0 - self.eval_seconds * to_come
        steps = min(max(state.step + int(0.98 * left / pace), math.ceil(state.step / flat) + 1), self.most)
        if state.step < round(train.warmup * steps) or abs(steps - length) <= 0.02 * length:
            return None
        why = f"{steps} steps fit into train.time_budget_s={train.time_budget_s:g}, not {length}"
        console.say(f"step {state.step}: {why}")
        return Change(step=state.step, length=steps, stretch=True, why=why)


class Checkpointer:
    """Saves every `every` steps and at the end, beside the training; on a signal, saves and leaves with Preempted."""

    def __init__(self, path: Path, every: int, schedule: RunSchedule, facts: dict[str, Any]) -> None:
        self.path, self.every, self.schedule, self.facts = path, every, schedule, facts
        self.saving: Saving | None = None

    def __call__(self, state: State, m: StepMetrics) -> None:
        stop = ranks.total(bool(interrupts.requested))[0] > 0  # all processes leave at the same step
        if stop or state.stopped or self.schedule.due(state.step, self.every):
            self.finish()
            if ranks.main:
                self.saving = Saving(state, self.path, self.facts)
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
