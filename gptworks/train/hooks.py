"""What happens beside the steps: logging, evaluation, samples, checkpoints, stopping. Each is a hook of the loop."""

import json
import math
import os
import time
from pathlib import Path
from typing import Any

from gptworks.core import folder
from gptworks.core.config import Config
from gptworks.core.errors import Preempted
from gptworks.core.log import console, count, duration
from gptworks.core.runtime import interrupts, peak_memory, process_seconds
from gptworks.data.shards import Shards
from gptworks.data.tokenizer import Tokenizer
from gptworks.infer.engine import Engine
from gptworks.infer.sampling import Sampling
from gptworks.infer.scoring import Score, score
from gptworks.train.loop import StepMetrics
from gptworks.train.state import State, save


class Metrics:
    """metrics.jsonl, always; the same values in tensorboard/, under Hugging Face's tag names, when asked.

    A resumed run drops what was logged after the checkpoint it continues from, so no step is there twice.
    """

    def __init__(self, run: Path, from_step: int, tensorboard: bool) -> None:
        self.path = run / "metrics.jsonl"
        self.last_loss: float | None = None  # the last logged training loss, of this process or one before
        self._trim(from_step)
        self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115
        self.board: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(run / "tensorboard"), purge_step=from_step + 1 if from_step else None)

    def _trim(self, from_step: int) -> None:
        if not self.path.is_file():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
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
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()
        if self.board:
            for tag, value in values.items():
                self.board.add_scalar(tag, value, step)

    def text(self, step: int, tag: str, text: str) -> None:
        self.file.write(json.dumps({"step": step, tag: text}, ensure_ascii=False) + "\n")
        self.file.flush()
        if self.board:
            self.board.add_text(tag, f"    {text}".replace("\n", "\n    "), step)

    def hyperparameters(self, config_text: str, config: Config) -> None:
        if not self.board:
            return
        self.board.add_text("config", "    " + config_text.replace("\n", "\n    "), 0)
        flat = {
            f"{section}.{key}": value if isinstance(value, (int, float, str, bool)) else str(value)
            for section, values in config.model_dump(mode="json").items()
            if isinstance(values, dict)
            for key, value in values.items()
            if value is not None
        }
        from torch.utils.tensorboard.summary import hparams

        for summary in hparams(flat, {"eval/loss": 0.0}):
            self.board.file_writer.add_summary(summary)

    def close(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        if self.board:
            self.board.close()


class Logger:
    """Logs every `every` steps, and keeps the live line current."""

    def __init__(
        self,
        metrics: Metrics,
        every: int,
        total: int,
        bytes_per_token: float,
        flops: float,
        rate: float,
        epoch_rows: int,
    ) -> None:
        self.metrics, self.every, self.total = metrics, every, total
        self.nats_to_bits_per_byte = 1 / math.log(2) / bytes_per_token
        self.flops, self.rate, self.epoch_rows = flops, rate, epoch_rows
        self._seconds = self._data = self._weight = self._loss = 0.0
        self._said = 0.0

    def __call__(self, state: State, m: StepMetrics) -> None:
        self._seconds += m.seconds
        self._data += m.data_seconds
        self._weight += m.weight
        self._loss += m.loss * m.weight
        if state.step % self.every and state.step != state.length(self.total) and not state.stopped:
            return
        loss = self._loss / self._weight
        speed = self._weight / self._seconds
        self.metrics.write(
            state.step,
            {
                "train/loss": loss,
                "train/bits_per_byte": loss * self.nats_to_bits_per_byte,
                "train/grad_norm": m.grad_norm,
                "train/learning_rate": m.lr,
                "train/epoch": state.cursor.epoch + state.cursor.row / self.epoch_rows,
                "train/tokens": state.tokens,
                "train/tokens_per_second": speed,
                "train/mfu": speed * self.flops / self.rate,
                "train/data_wait": self._data / self._seconds,
                "train/seconds": state.seconds,
                "train/memory_gib": peak_memory() / 2**30,
            },
        )
        line = self._line(state, loss, speed)
        self._seconds = self._data = self._weight = self._loss = 0.0
        if console.terminal:
            console.live(line)
        if time.perf_counter() - self._said > (10 if not console.terminal else 30) or state.step == state.length(
            self.total
        ):
            self._said = time.perf_counter()
            console.say(line)

    def _line(self, state: State, loss: float, speed: float) -> str:
        total = state.length(self.total)
        left = (total - state.step) * state.seconds / state.step
        return (
            f"step {state.step:>{len(str(total))}}/{total}  loss {loss:.4f}  "
            f"{loss * self.nats_to_bits_per_byte:.3f} bits/byte  {count(speed)} tokens/s  "
            f"{speed * self.flops / self.rate:.0%} of matmul rate  data {self._data / max(self._seconds, 1e-9):.1%}  "
            f"{duration(left)} left"
        )


class Evaluator:
    """Exact loss on the evaluation split every `every` steps; ends the run on a target or when patience runs out."""

    def __init__(self, metrics: Metrics, shards: Shards, config: Config, total: int, rows: int) -> None:
        self.metrics, self.shards, self.total, self.rows = metrics, shards, total, rows
        self.every, self.train = config.train.eval_every or total, config.train
        self.last: tuple[int, Score] | None = None

    def measure(self, state: State) -> Score:
        """The score of the weights as they are, measured once a step."""
        if self.last is None or self.last[0] != state.step:
            assert self.train.context
            self.last = (state.step, score(state.model, self.shards.eval, self.train.context, self.rows))
        return self.last[1]

    def __call__(self, state: State, m: StepMetrics) -> str | None:
        if not state.due(self.every, self.total):
            return None
        total = state.length(self.total)
        found = self.measure(state)
        values = {f"eval/{key}": getattr(found, key) for key in ("loss", "bits_per_byte", "perplexity")}
        self.metrics.write(state.step, {**values, "train/tokens": state.tokens, "train/seconds": state.seconds})
        console.say(
            f"step {state.step:>{len(str(total))}}/{total}  eval loss {found.loss:.4f}  "
            f"{found.bits_per_byte:.3f} bits/byte  perplexity {found.perplexity:.2f}"
        )
        if state.best_loss is None or found.loss < state.best_loss:
            state.best_loss, state.evals_since_best = found.loss, 0
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
        self, metrics: Metrics, tokenizer: Tokenizer, stop_ids: tuple[int, ...], config: Config, total: int
    ) -> None:
        self.metrics, self.tokenizer, self.stop_ids = metrics, tokenizer, stop_ids
        self.options, self.seed = config.generate, config.train.seed
        self.total = total

    def __call__(self, state: State, m: StepMetrics) -> None:
        steps = {max(round(state.length(self.total) * share), 1) for share in (0.1, 0.25, 0.5, 1.0)}
        if state.step not in steps or not self.options.prompts:
            return
        engine = Engine(state.model, self.tokenizer, self.stop_ids)
        how = sampling(self.options, self.seed)
        prompt = self.options.prompts[0]
        result = engine.generate(prompt, how, min(100, self.options.max_new_tokens))
        self.metrics.text(state.step, "sample", prompt + result.text)


def sampling(options: Any, seed: int | None) -> Sampling:
    """The sampling a recipe's `generate` section asks for."""
    return Sampling(options.repetition_penalty, options.temperature, options.top_k, options.top_p, options.min_p, seed)


class Budget:
    """Plans a run with a time budget anew while its learning rate is flat, from the pace so far.

    A machine is rarely as fast as in the seconds it was timed. What is decided is part of the state, saved by the
    Checkpointer at the same step, and read back by a resume or a replay; a run that was interrupted keeps its plan.
    """

    def __init__(self, config: Config, total: int, most: int, state: State) -> None:
        assert config.train.checkpoint_every
        self.train, self.total, self.most, self.every = config.train, total, most, config.train.checkpoint_every
        self.from_step, self.started = state.step, time.perf_counter()

    def __call__(self, state: State, m: StepMetrics) -> None:
        train, length = self.train, state.length(self.total)
        flat = {"constant": 1.0, "wsd": 1 - train.cooldown}.get(train.schedule, 0.0)
        if (
            self.from_step
            or not train.time_budget_s
            or state.step >= flat * length
            or not state.due(self.every, self.total)
        ):
            return
        pace = (time.perf_counter() - self.started) / state.step  # evaluations, samples and checkpoints included
        left = train.time_budget_s - process_seconds() - 2.0
        steps = min(max(state.step + int(0.98 * left / pace), math.ceil(state.step / flat) + 1), self.most)
        if state.step >= round((train.warmup or 0.0) * steps) and abs(steps - length) > 0.02 * length:
            state.replans.append([state.step, steps])
            console.say(
                f"step {state.step}: {steps} steps fit into train.time_budget_s={train.time_budget_s:g}, not {length}"
            )


class Checkpointer:
    """Saves every `every` steps and at the end; on a signal, saves and leaves with Preempted."""

    def __init__(self, path: Path, every: int, total: int, facts: dict[str, Any]) -> None:
        self.path, self.every, self.total, self.facts = path, every, total, facts

    def __call__(self, state: State, m: StepMetrics) -> None:
        if interrupts.requested:
            save(state, self.path, self.facts)
            raise Preempted(
                f"stopped by {interrupts.requested} at step {state.step}; saved, run the same command to continue"
            )
        if state.due(self.every, self.total) or state.stopped:
            save(state, self.path, self.facts)
