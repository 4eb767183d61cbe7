"""Whole commands, as processes beside the other checks: killed and continued, verified, launched, refused."""

import contextlib
import copy
import hashlib
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from gptworks.model import build
from gpu_parts.right_models import CONTEXT, CPU, ROOT, WINDOW
from gpu_parts.right_paths import greedy
from gpu_parts.sheet import Missing, Sheet

WORDS = "the king and queen walked slowly over old stones nobody answered where rain sang".split()  # noqa: SIM905
RUN: dict[str, Any] = {
    "data.separator": r"\n", "tokenizer.kind": "bytes", "model.family": "qwen3", "model.hidden_size": 64,
    "model.num_hidden_layers": 2, "model.num_attention_heads": 4, "model.num_key_value_heads": 2, "model.dropout": 0.1,
    "train.context": CONTEXT, "train.batch_tokens": 16 * CONTEXT, "train.micro_batch": 8, "train.optimizer": "muon",
    "train.compile": "false", "train.deterministic": "true", "train.threads": 1, "train.log_every": 1,
    "train.tensorboard": "false", "generate.max_new_tokens": 8,
}  # fmt: skip


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str
    seconds: float

    def __str__(self) -> str:
        return f"exit {self.code} after {self.seconds:.0f} s: {self.err[-600:]}"


class Commands:
    """Commands beside what is checked in this process, at most four at a time. Nothing is timed meanwhile."""

    def __init__(self, sheet: Sheet, place: Path) -> None:
        self.sheet, self.place = sheet, place
        self.steps, self.every, self.killed_at = (9, 3, 8) if sheet.tiny else (48, 12, 42)
        self.pool = ThreadPoolExecutor(4, "command")
        self.living: set[subprocess.Popen[str]] = set()
        self.closed, self.lock = False, threading.Lock()
        self.waiting: dict[str, Future[Any]] = {}
        draw = random.Random(1)
        lines = [" ".join(draw.choice(WORDS) for _ in range(draw.randint(3, 30))) for _ in range(600)]
        (place / "text.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        (place / "empty.yaml").write_text("{}\n")

    def __enter__(self) -> "Commands":
        return self

    def __exit__(self, *error: object) -> None:
        with self.lock:
            self.closed = True
            for process in self.living:
                end(process)
        self.pool.shutdown(cancel_futures=True)

    def start(self) -> None:
        """Everything at once; the rows come when they are asked for."""
        work = {"straight": self._straight, "killed": self._killed, "launched": self._launched,
                "refused": self._refused, "tests": self._tests}  # fmt: skip
        self.waiting = {name: self.pool.submit(one) for name, one in work.items()}

    def result(self, name: str) -> Any:
        """Raises Missing where time runs out first, and whatever went wrong."""
        try:
            return self.waiting[name].result(max(self.sheet.left(), 0.1))
        except TimeoutError:
            raise Missing("it was still at work when the time was over") from None

    # -- in threads

    def _command(self, *line: str, **environment: str) -> Done:
        """Runs Python with these arguments to its end, in a session of its own, so that all of it can be ended."""
        clean = {key: value for key, value in os.environ.items() if key != "CUBLAS_WORKSPACE_CONFIG"}  # its own affair
        clean |= {"PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false", **environment}
        if self.sheet.device.type == "cpu":
            clean["CUDA_VISIBLE_DEVICES"] = ""
        began = time.monotonic()
        with self.lock:
            assert not self.closed
            process = subprocess.Popen(
                [sys.executable, *line], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace",
                env=clean, cwd=ROOT, start_new_session=True,
            )  # fmt: skip
            self.living.add(process)
        try:
            out, err = process.communicate(timeout=max(self.sheet.left(), 1))
        except subprocess.TimeoutExpired:
            end(process)
            out, err = process.communicate()
            err += "\n(ended as the time was over)"
        finally:
            with self.lock:
                self.living.discard(process)
        return Done(process.returncode, out, err, time.monotonic() - began)

    def _training(self, out: str, **more: Any) -> list[str]:
        values = RUN | {"data.train": self.place / "text.txt", "train.max_steps": self.steps}
        values |= {"train.checkpoint_every": self.every, "train.eval_every": self.steps // 2}
        pairs = [f"{key}={value}" for key, value in (values | more).items()]
        return ["train", str(self.place / "empty.yaml"), *pairs, "--out", str(self.place / out)]

    def _straight(self) -> tuple[Done, Done | None]:
        trained = self._command("-m", "gptworks", *self._training("straight"))
        verified = None
        if trained.code == 0:
            verified = self._command("-m", "gptworks", "verify", str(self.place / "straight"), "--json")
        return trained, verified

    def _killed(self) -> tuple[Done, Done]:
        """Killed before an update whose gradient is ready, then given the same command again."""
        line = ["-m", "gptworks", *self._training("killed")]
        return self._command(*line, GPTWORKS_FAILPOINT=f"step.update:{self.killed_at}:kill"), self._command(*line)

    def _launched(self) -> Done:
        port = str(29600 + os.getpid() % 9000)
        torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "1", "--master-port", port]
        return self._command(*torchrun, "-m", "gptworks", *self._training("launched"), OMP_NUM_THREADS="1")

    def _refused(self) -> Done:
        absurd = {"train.micro_batch": 10**9, "train.batch_tokens": 10**9 * CONTEXT}
        return self._command("-m", "gptworks", *self._training("refused", **absurd))

    def _tests(self) -> Done | None:
        files = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]
        if self.sheet.device.type == "cpu" or not files or not importlib.util.find_spec("pytest"):
            return None
        return self._command("-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "-rs", *map(str, files))

    # -- rows

    def _finished(self, name: str, done: Done) -> Path:
        assert done.code == 0, f"{name}: {done}"
        return self.place / name

    def continued(self) -> None:
        straight = self._finished("straight", self.result("straight")[0])
        first, second = self.result("killed")
        assert first.code == -signal.SIGKILL, f"it was to be killed: {first}"
        assert "continues from step" in second.err, str(second)
        killed = self._finished("killed", second)
        hashes = [weights_hash(path) for path in (straight, killed)]
        verdict = "right" if hashes[0] == hashes[1] else "WRONG"
        shown = "the same bits" if hashes[0] == hashes[1] else "other bits"
        name = f"killed at step {self.killed_at} of {self.steps} and continued (deterministic): final weights"
        sheet_facts = {"hashes": hashes, "losses": [losses(straight)[-3:], losses(killed)[-3:]]}
        self.sheet.row(name, shown, "the same bits as the straight run's", verdict, **sheet_facts)

    def verified(self) -> None:
        trained, verified = self.result("straight")
        self._finished("straight", trained)
        assert verified is not None and verified.code in (0, 65), str(verified)
        assert verified.out.strip(), str(verified)
        found = json.loads(verified.out)
        verdict = "right" if found["identical"] else "WRONG"
        self.sheet.row("gptworks verify of a deterministic run", found["verdict"], "identical to the bit", verdict)

    def launched(self) -> None:
        straight = self._finished("straight", self.result("straight")[0])
        launched = self._finished("launched", self.result("launched"))
        ours, theirs = losses(straight), losses(launched)
        assert len(ours) == len(theirs) == self.steps
        error = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
        self.sheet.check("losses under torchrun against those without", error, 0.0, first=ours[0], last=ours[-1])

    def text(self) -> None:
        """The text of the model that was trained on the GPU, there and on the CPU, from its folder."""
        loaded = build.load(self._finished("straight", self.result("straight")[0]) / "model")
        length = CONTEXT + WINDOW
        made = [greedy(copy.deepcopy(loaded.model).to(to), loaded.tokenizer, length) for to in (self.sheet.device, CPU)]
        same = sum(a == b for a, b in zip(*made, strict=True))
        verdict = "right" if made[0] == made[1] else "WRONG"
        text = loaded.tokenizer.decode(made[1])
        self.sheet.row("greedy text of a trained model against the CPU's", f"{same} of {length} tokens the same",
                       "all", verdict, text=text)  # fmt: skip

    def refused(self) -> None:
        done = self.result("refused")
        said = next((line for line in done.err.splitlines() if line.startswith("error: ")), done.err[-300:])
        verdict = "right" if done.code == 77 and "train.micro_batch=" in said.partition("free")[2] else "WRONG"
        self.sheet.row("a micro-batch that fits nowhere", f"exit {done.code}, {said}", "exit 77 and what fits", verdict)

    def tested(self) -> None:
        done = self.result("tests")
        if done is None:
            raise Missing("no GPU here" if self.sheet.device.type == "cpu" else "pytest, or a test with its mark")
        last = (done.out.strip().splitlines() or [str(done)])[-1]
        verdict = "right" if done.code == 0 else "WRONG"
        said = [line for line in done.out.splitlines() if line.startswith(("FAILED", "ERROR", "SKIPPED", "E  "))]
        self.sheet.row("the tests that need a GPU", last, "all pass", verdict, said=said[:40], seconds=done.seconds)


def end(process: subprocess.Popen[str]) -> None:
    """Of a process and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def weights_hash(run: Path) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(load_file(run / "model" / "model.safetensors").items()):
        digest.update(name.encode())
        digest.update(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line["train/loss"] for line in lines if "train/loss" in line]
