"""The log of a run: metrics.jsonl always, and the same values where a person looks at them."""

import contextlib
import importlib.util
import json
import math
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from gptworks.core import folder
from gptworks.core.config import Config
from gptworks.core.errors import DataError, NotFinite, UsageError
from gptworks.core.failpoint import failpoint
from gptworks.core.log import console

WANDB_ID = "wandb_id.txt"  # of the run at Weights & Biases; goes with the folder
P = ParamSpec("P")
T = TypeVar("T")

# What is logged of every step under train/, besides the figures of its objective.
LOGGED = frozenset({
    "loss", "bits_per_byte", "grad_norm", "learning_rate", "epoch", "tokens", "tokens_per_second", "mfu", "data_wait",
    "seconds", "memory_gib", "skipped", "loss_scale",
})  # fmt: skip


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
        self.wandb: Any = None
        if wandb:
            self.wandb = self._at_wandb(lambda: _wandb(wandb, run))

    def _at_wandb(self, act: Callable[[], Any]) -> Any:
        """Does something at Weights & Biases. Where that fails, the run goes on without it, which is said once."""
        try:
            return act()
        except Exception as error:  # of another program's, and of its network
            self.wandb = None
            console.warn(f"Weights & Biases failed, and hears no more of this run: {type(error).__name__}: {error}")

    def _trim(self, from_step: int) -> None:
        kept = []
        for line in logged_lines(self.path):
            try:
                row = json.loads(line)
                if 0 < from_step >= row["step"]:  # a run that begins anew measures its step 0 anew
                    kept.append(line + "\n")
                    self.last_loss = row.get("train/loss", self.last_loss)
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                continue  # a line that a power cut left half-written
        if self.path.is_file():
            folder.write_text(self.path, "".join(kept))

    def write(self, step: int, values: dict[str, float]) -> None:
        """Raises NotFinite; nothing is written then."""
        for name, value in values.items():
            if not math.isfinite(value):
                raise NotFinite(f"step {step}: {name} is {value}; nothing of it was written")
        self.last_loss = values.get("train/loss", self.last_loss)
        failpoint("metrics.write")
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()
        if self.board:
            for tag, value in values.items():
                self.board.add_scalar(tag, value, step)
        if self.wandb:
            row = {**values, "step": step}  # by a metric of our own, so that a resumed run may go back
            self._at_wandb(lambda: self.wandb.log(row))

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
            self._at_wandb(lambda: self.wandb.config.update(flat, allow_val_change=True))
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
            self._at_wandb(self.wandb.finish)


class Account:
    """run.json: the recipe of a run, and where its time went, over all the processes that trained it."""

    def __init__(self, run: Path, recipe: str = "") -> None:
        self.path = run / "run.json"
        kept: Any = None
        with contextlib.suppress(DataError):
            kept = folder.read_json(self.path)
        kept = kept if isinstance(kept, dict) else {}
        seconds = kept.get("seconds")
        self.recipe = recipe or str(kept.get("recipe") or "")
        self.seconds: dict[str, float] = dict(seconds) if isinstance(seconds, dict) else {}

    def add(self, what: str, seconds: float) -> None:
        before = self.seconds.get(what)
        self.seconds[what] = round((before if isinstance(before, int | float) else 0.0) + seconds, 3)

    @contextlib.contextmanager
    def spent(self, what: str) -> Iterator[None]:
        """Counts the seconds of the block."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.add(what, time.perf_counter() - begun)

    def timed(self, what: str, hook: Callable[P, T]) -> Callable[P, T]:
        """Makes the same function, whose seconds are counted."""

        def call(*arguments: P.args, **options: P.kwargs) -> T:
            with self.spent(what):
                return hook(*arguments, **options)

        return call

    def write(self) -> None:
        """Puts the file in place. Raises StorageError."""
        folder.write_json(self.path, {"recipe": self.recipe, "seconds": self.seconds})


def write_passage(run: Path, step: int, pieces: list[tuple[str, list[float]]]) -> None:
    """Writes passage.json: held-out text with the losses of its tokens, for the report. Raises StorageError."""
    losses = [loss for _, own in pieces for loss in own]
    if losses:
        facts = {"step": step, "tokens": len(losses), "loss": round(sum(losses) / len(losses), 4), "pieces": pieces}
        folder.write_text(run / "passage.json", json.dumps(facts, ensure_ascii=False, allow_nan=False) + "\n")


def logged_lines(path: Path) -> list[str]:
    """The lines of a metrics.jsonl; none where there is no file. Raises DataError where it is no text."""
    folder.check_regular(path)
    try:
        with folder.storage_errors(path):
            content = path.read_bytes() if path.is_symlink() or path.exists() else b""
        return content.decode("utf-8").split("\n")  # a sample may have other ends of lines in it
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error}); move it away to go on without what was logged") from None


def check_wandb(project: str | None) -> None:
    """Raises UsageError where Weights & Biases is asked for and not installed."""
    if project is not None and importlib.util.find_spec("wandb") is None:
        raise UsageError(f'train.wandb={project}: wandb is not installed; pip install "gptworks[wandb]"')


def check_login(project: str | None) -> None:
    """Raises UsageError where Weights & Biases is asked for and nobody is logged in; on a terminal it asks first."""
    check_wandb(project)
    if project is None:
        return
    import wandb

    try:
        wandb.login()
    except Exception as error:
        raise UsageError(
            f"train.wandb={project}: {str(error).rstrip('.')}; run `wandb login`, or set WANDB_MODE=offline"
        ) from None


def _wandb(project: str, run: Path) -> Any:
    """A Weights & Biases run that goes on where the run in this folder does, under whatever name the folder has."""
    import wandb

    kept = run / WANDB_ID
    name = kept.read_text(encoding="utf-8").strip() if kept.is_file() else ""
    if not re.fullmatch(r"[0-9a-f]{16}", name):
        name = secrets.token_hex(8)
        folder.write_text(kept, name + "\n")
    board = wandb.init(project=project, id=name, name=run.name, resume="allow", dir=str(run))
    board.define_metric("*", step_metric="step")
    return board
