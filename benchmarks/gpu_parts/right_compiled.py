"""Compiled steps of the loop against eager ones, some models in each of a few processes."""

import functools
import importlib.util
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from gptworks.core import runtime
from gptworks.model.transforms import use_float8
from gptworks.training import loop
from gptworks.training.state import State
from gpu_parts.right_models import BOUNDS, CONTEXT, DTYPES, EIGHTH, SUMMED, config_of, gap, judge, model_of, steps
from gpu_parts.right_paths import adapted
from gpu_parts.sheet import Missing, Sheet


@dataclass(frozen=True)
class Case:
    """A model whose compiled steps are compared with its eager ones."""

    family: str
    dtype: str = "bf16"
    documents: bool = False
    flexible: bool = False  # whether attention within documents is FlexAttention's on a GPU
    parts: dict[str, Any] = field(default_factory=dict)
    adapter: str | None = None  # how the base is held, of which adapters alone are trained
    float8: bool = False
    tiny: bool = False  # in a tiny run too


COMPILED = {
    "compiled gpt2": Case("gpt2"),
    "compiled documents, grouped heads": Case("qwen3", documents=True, flexible=True),
    "compiled documents, a window in one of two layers": Case("qwen2", documents=True, flexible=True),
    "compiled documents in fp32": Case("qwen2", "fp32", documents=True, flexible=True, tiny=True),
    # Each token gets all experts: which of them were likeliest would hang on rounding.
    "compiled experts": Case("qwen3_moe", parts={"num_experts_per_tok": 8}),
    "compiled qwen3": Case("qwen3"),
    "compiled in float8": Case("qwen3", float8=True),
    "compiled adapters on nf4": Case("qwen3", adapter="nf4"),
    "compiled documents, capped scores": Case("gemma2", documents=True),
    "compiled in fp16": Case("llama", "fp16"),
}


class Compilers:
    """Processes that compile models, some each: the compiler works on one processor most of the time."""

    MOST = 5

    def __init__(self, sheet: Sheet) -> None:
        self.sheet = sheet
        self.processes: list[tuple[list[str], subprocess.Popen[bytes]]] = []

    def __enter__(self) -> "Compilers":
        return self

    def start(self) -> None:
        if self.sheet.device.type == "cpu":
            return
        code = "import sys; from gpu_parts import right_compiled; right_compiled.compile_some(*sys.argv[1:])"
        env = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "2"}
        names = list(COMPILED)
        for number in range(self.MOST):
            some = names[number :: self.MOST]
            command = [sys.executable, "-c", code, str(self.sheet.out), f"{self.sheet.left():.1f}", *some]
            self.processes.append((some, subprocess.Popen(command, env=env)))

    def wait(self) -> None:
        """Until all are done or the time is over; what was not reached is a row.

        On a CPU one model is compiled, here, and traced only: to make code takes half a minute for each.
        """
        if self.sheet.device.type == "cpu":
            with mock.patch.object(torch, "compile", functools.partial(torch.compile, backend="eager")):
                for name in COMPILED:
                    self.sheet.attempt(name, functools.partial(compiled, self.sheet, name))
        for names, process in self.processes:
            try:
                process.wait(max(self.sheet.left(), 0.1))
            except subprocess.TimeoutExpired:
                process.kill()
            told = (self.sheet.out / "rows.jsonl").read_text()
            for name in names:
                if f'"name": "{name}' not in told:
                    self.sheet.row(name, f"not reached; exit code {process.poll()}", verdict="not measured")

    def __exit__(self, *error: object) -> None:
        for _, process in self.processes:
            process.kill()
            process.wait()


def compile_some(out: str, seconds: str, *names: str) -> None:
    """What one of these processes does."""
    sheet = Sheet(Path(out), "right", float(seconds), False)
    torch.set_float32_matmul_precision("highest")
    for name in names:
        sheet.attempt(name, functools.partial(compiled, sheet, name), 6)


def compiled(sheet: Sheet, name: str) -> None:
    """Three steps compiled against three eager ones. The compiler's count says that something was compiled, and that
    later steps, with other documents, needed nothing new."""
    case = COMPILED[name]
    if sheet.tiny and not case.tiny:
        raise Missing("a tiny run compiles one model only")
    if sheet.device.type == "cuda" and not importlib.util.find_spec("triton"):
        raise Missing("Triton is not installed")
    if case.float8 and not runtime.has_float8(sheet.device):
        raise Missing(f"this {sheet.device.type} has no float8 units")
    from torch._dynamo import reset
    from torch._dynamo.utils import counters

    model, dtype = model_of(config_of(case.family, **case.parts)), DTYPES[case.dtype]
    if case.adapter:
        model = adapted(model, base=case.adapter)
    if case.float8:
        use_float8(model)
    eager = steps(model, dtype, sheet.device, documents=case.documents)
    reset()  # or a function that is compiled for many models is at last compiled for no more
    counters.clear()
    graphs: list[int] = []

    def count(state: State, m: loop.StepMetrics) -> None:
        graphs.append(counters["stats"]["unique_graphs"])

    began = time.perf_counter()
    made = steps(model, dtype, sheet.device, True, case.documents, hooks=[count])
    facts: dict[str, Any] = {
        "seconds": time.perf_counter() - began,
        "graphs": graphs,
        "breaks": {str(why)[:200]: times for why, times in counters["graph_break"].items()},
        "losses": [eager.losses, made.losses],
    }
    bounds = EIGHTH if case.float8 else SUMMED if case.dtype == "fp32" else BOUNDS[case.dtype]
    found = {case.family: gap(made.made, eager.made)}
    judge(sheet, f"{name}, 3 steps against eager ones", found, bounds, **facts)
    assert graphs[0], "nothing was compiled"
    assert graphs[0] == graphs[-1], f"graphs after each step: {graphs}: later steps were compiled anew"
    if case.flexible and sheet.device.type == "cuda":
        segments = torch.zeros(1, CONTEXT, dtype=torch.int32, device=sheet.device)
        assert made.state.model.train().can_flex(segments), "attention was not left to FlexAttention"


def loop_in_fp16(sheet: Sheet) -> None:
    """Three steps in fp16 against three in fp32, with dropout nowhere and all else as the loop does it."""
    model = model_of(config_of("llama"))
    found, wanted = (steps(model, dtype, sheet.device) for dtype in (torch.float16, torch.float32))
    judge(sheet, "3 steps in fp16 against fp32", {"llama": gap(found.made, wanted.made)}, BOUNDS["fp16"],
          losses=[wanted.losses, found.losses])  # fmt: skip
