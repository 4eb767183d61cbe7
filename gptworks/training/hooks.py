"""What happens beside the steps: logging, evaluation, samples, checkpoints, stopping. Each is a hook of the loop."""

import hashlib
import importlib.util
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gptworks.core import folder
from gptworks.core.config import Change, Config
from gptworks.core.errors import Preempted, UsageError
from gptworks.core.failpoint import failpoint
from gptworks.core.log import console, count, duration
from gptworks.core.ranks import ranks
from gptworks.core.runtime import interrupts, peak_memory, process_seconds
from gptworks.data.shards import Shards
from gptworks.data.tokenizer import Tokenizer
from gptworks.infer.engine import Engine
from gptworks.infer.sampling import Sampling
from gptworks.infer.scoring import Score, expert_use, score
from gptworks.training.loop import StepMetrics
from gptworks.training.schedule import RunSchedule, flat_share
from gptworks.training.state import Saving, State, using


class Metrics:
    """metrics.jsonl, always; the same values in tensorboard/, under Hugging Face's tag names, and at Weights & Biases,
    when asked.

    A resumed run drops what was logged after the checkpoint it continues from, so no step is there twice.
    """

    def __init__(self, run: Path, from_step: int, tensorboard: bool, wandb: str | None = None) -> None:
        self.path = run / "metrics.jsonl"
        self.last_loss: float | None = None  # the last logged training loss, of this process or one before
        self._trim(from_step)
        self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115
        self.board: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(run / "tensorboard"), purge_step=from_step + 1 if from_step else None)
        self.wandb: Any = _wandb(wandb, run) if wandb else None

    def _trim(self, from_step: int) -> None:
        if not self.path.is_file():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").split("\n"):  # a sample may have other ends of lines in it
            try:
                row = json.loads(line)
                if row["step"] <= from_step:
                    kept.append(line + "\n")
                    self.last_loss = row.get("train/loss", self.last_loss)
            except (ValueError, KeyError, TypeError):
                continue  # a line that a power cut left half-written
        folder.write_text(self.path, "".join(kept))

    def write(self, step: int, values: dict[str, float]) -> None:
        self.last_loss = values.get("train/loss", self.last_loss)
        failpoint("metrics.write")
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()
        if self.board:
            for tag, value in values.items():
                self.board.add_scalar(tag, value, step)
        if self.wandb:
            self.wandb.log({**values, "step": step})  # by a metric of our own, so that a resumed run may go back

    def text(self, step: int, tag: str, text: str) -> None:
        self.file.write(json.dumps({"step": step, tag: text}, ensure_ascii=False) + "\n")
        self.file.flush()
        if self.board:
            self.board.add_text(tag, f"    {text}".replace("\n", "\n    "), step)

    def hyperparameters(self, config_text: str, config: Config) -> None:
        flat = {
            f"{section}.{key}": value if isinstance(value, (int, float, str, bool)) else str(value)
            for section, values in config.model_dump(mode="json").items()
            if isinstance(values, dict)
            for key, value in values.items()
            if value is not None
        }
        if self.wandb:
            self.wandb.config.update(flat, allow_val_change=True)
        if not self.board:
            return
        from torch.utils.tensorboard.summary import hparams

        self.board.add_text("config", "    " + config_text.replace("\n", "\n    "), 0)
        for summary in hparams(flat, {"eval/loss": 0.0}):
            self.board.file_writer.add_summary(summary)

    def close(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        if self.board:
            self.board.close()
        if self.wandb:
            self.wandb.finish()


def check_wandb(project: str | None) -> None:
    """Raises UsageError where Weights & Biases is asked for and not installed."""
    if project is not None and importlib.util.find_spec("wandb") is None:
        raise UsageError(f'train.wandb={project}: wandb is not installed; pip install "gptworks[wandb]"')


def _wandb(project: str, run: Path) -> Any:
    """A Weights & Biases run that goes on where the run in this folder does."""
    import wandb

    name = hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:16]
    board = wandb.init(project=project, id=name, name=run.name, resume="allow", dir=str(run))
    board.define_metric("*", step_metric="step")
    return board


class Logger:
    """Logs every `every` steps, and keeps the live line current."""

    def __init__(
        self,
        metrics: Metrics,
        every: int,
        schedule: RunSchedule,
        bytes_per_token: float,
        flops: float,
        rate: float,
        epoch_rows: int,
    ) -> None:
        self.metrics, self.every, self.schedule = metrics, every, schedule
        self.nats_to_bits_per_byte = 1 / math.log(2) / bytes_per_token
        self.flops, self.rate, self.epoch_rows = flops, rate, epoch_rows
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
                "train/bits_per_byte": loss * self.nats_to_bits_per_byte,
                **{f"train/{name}": total / weight for name, (total, weight) in self._figures.items() if weight},
                **({"train/grad_norm": m.grad_norm} if math.isfinite(m.grad_norm) else {}),
                "train/learning_rate": m.lr,
                "train/epoch": state.cursor.epoch + state.cursor.row / self.epoch_rows,
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
        if (
            time.perf_counter() - self._said > (10 if not console.terminal else 30)
            or state.step == self.schedule.length
        ):
            self._said = time.perf_counter()
            console.say(line)

    def _line(self, state: State, loss: float, speed: float) -> str:
        total = self.schedule.length
        left = (total - state.step) * state.seconds / state.step
        return (
            f"step {state.step:>{len(str(total))}}/{total}  loss {loss:.4f}  "
            f"{loss * self.nats_to_bits_per_byte:.3f} bits/byte  {count(speed)} tokens/s  "
            f"{speed * self.flops / self.rate:.0%} of matmul rate  data {self._data / max(self._seconds, 1e-9):.1%}  "
            f"{duration(left)} left"
        )


class Evaluator:
    """Exact loss on the evaluation split every `every` steps; ends the run on a target or when patience runs out."""

    def __init__(
        self, metrics: Metrics | None, shards: Shards, config: Config, schedule: RunSchedule, rows: int
    ) -> None:
        """`metrics` is None where nothing is to be written: in a replay, and on all processes but the main one."""
        self.metrics, self.shards, self.schedule, self.rows = metrics, shards, schedule, rows
        self.every, self.train = config.train.eval_every or schedule.planned, config.train
        self.last: tuple[int, Score] | None = None

    def measure(self, state: State) -> Score:
        """The score of the weights, or of their average where one is kept; measured once a step."""
        if self.last is None or self.last[0] != state.step:
            assert self.train.context
            failpoint("eval.start")
            with using(state.model, state.average):
                self.last = (state.step, score(state.model, self.shards.eval, self.train.context, self.rows))
        return self.last[1]

    def final(self, state: State) -> Score:
        """The score of the weights that the run gives: the best where they are kept, else as `measure`."""
        if not state.best:
            return self.measure(state)
        assert self.train.context
        with using(state.model, state.best):
            return score(state.model, self.shards.eval, self.train.context, self.rows)

    def __call__(self, state: State, m: StepMetrics) -> str | None:
        if not self.schedule.due(state.step, self.every):
            return None
        total = self.schedule.length
        found = self.measure(state)
        if self.metrics:
            values = {f"eval/{key}": getattr(found, key) for key in ("loss", "bits_per_byte", "perplexity")}
            if state.model.config.num_experts and self.train.context:
                with using(state.model, state.average):
                    used = expert_use(state.model, self.shards.eval, self.train.context, self.rows)
                values |= {f"eval/{key}": value for key, value in used.items()}
            self.metrics.write(state.step, {**values, "train/tokens": state.tokens, "train/seconds": state.seconds})
            console.say(
                f"step {state.step:>{len(str(total))}}/{total}  eval loss {found.loss:.4f}  "
                f"{found.bits_per_byte:.3f} bits/byte  perplexity {found.perplexity:.2f}"
            )
        if state.best_loss is None or found.loss < state.best_loss:
            state.best_loss, state.evals_since_best = found.loss, 0
            if self.train.patience is not None:
                with using(state.model, state.average):
                    state.best = {name: p.detach().to("cpu", copy=True) for name, p in state.trained().items()}
        else:
            state.evals_since_best += 1
        if self.train.target_loss is not None and found.loss <= self.train.target_loss:
            return f"reached train.target_loss={self.train.target_loss}"
        if self.train.patience is not None and state.evals_since_best >= self.train.patience:
            return f"no improvement in {state.evals_since_best} evaluations (train.patience)"
        return None


class Sampler:
    """A sample of text now and then, so that a person sees the model learn."""

    def __init__(
        self, metrics: Metrics, tokenizer: Tokenizer, stop_ids: tuple[int, ...], config: Config, schedule: RunSchedule
    ) -> None:
        self.metrics, self.tokenizer, self.stop_ids = metrics, tokenizer, stop_ids
        self.options, self.seed = config.generate, config.train.seed
        self.schedule = schedule

    def __call__(self, state: State, m: StepMetrics) -> None:
        steps = {max(round(self.schedule.length * share), 1) for share in (0.1, 0.3, 1.0)}
        if state.step not in steps or not self.options.prompts:
            return
        engine = Engine(state.model, self.tokenizer, self.stop_ids)
        how = sampling(self.options, self.seed)
        prompt = self.options.prompts[0]
        with using(state.model, state.average):
            result = engine.generate(prompt, how, min(60, self.options.max_new_tokens))
        self.metrics.text(state.step, "sample", prompt + result.text)


def sampling(options: Any, seed: int | None) -> Sampling:
    """The sampling a recipe's `generate` section asks for."""
    return Sampling(options.repetition_penalty, options.temperature, options.top_k, options.top_p, options.min_p, seed)


class TimeBudget:
    """Plans a run with a time budget anew while its learning rate is flat, from the pace so far.

    A machine is rarely as fast as in the seconds it was timed. What is decided goes into config.yaml through `record`,
    from where a resume or a replay reads it; a run that was interrupted keeps its plan.
    """

    def __init__(
        self,
        config: Config,
        schedule: RunSchedule,
        most: int | None,
        eval_seconds: float,
        state: State,
        record: Callable[[], None],
    ) -> None:
        """`most` is None where the plan is an earlier process's."""
        assert config.train.checkpoint_every
        self.eval_seconds, self.evaluated, self.first = eval_seconds, 0, 0.0
        self.train, self.schedule, self.most, self.every = config.train, schedule, most, config.train.checkpoint_every
        self.record, self.from_step, self.started = record, state.step, time.perf_counter()

    def __call__(self, state: State, m: StepMetrics) -> None:
        flat = flat_share(self.train)
        self.first = self.first or m.seconds  # with what is compiled and allocated once
        self.evaluated += self.schedule.due(state.step, self.train.eval_every or self.schedule.planned)
        if (
            self.from_step
            or not self.train.time_budget_s
            or any(not change.stretch for change in self.schedule.changes)
            or state.step >= flat * self.schedule.length
            or not self.schedule.due(state.step, self.every)
        ):
            return
        if change := ranks.agree(self._decide(state, flat)):
            self.schedule.changes.append(change)
            self.record()

    def _decide(self, state: State, flat: float) -> Change | None:
        train, length = self.train, self.schedule.length
        assert train.time_budget_s and train.eval_every
        if self.most is None or state.step == 1:
            return None
        spent = time.perf_counter() - self.started - self.eval_seconds * self.evaluated
        pace = (max(spent, state.seconds) - self.first) / (state.step - 1)  # with samples and checkpoints
        # As many evaluations as planned, however long the run gets: their distance stretches with it.
        to_come = max(math.ceil(self.schedule.planned / train.eval_every) - self.evaluated, 1)
        left = train.time_budget_s - process_seconds() - 2.0 - self.eval_seconds * to_come
        steps = min(max(state.step + int(0.98 * left / pace), math.ceil(state.step / flat) + 1), self.most)
        if state.step < round((train.warmup or 0.0) * steps) or abs(steps - length) <= 0.02 * length:
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
