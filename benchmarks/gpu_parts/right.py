"""Whether all that runs on a GPU is right.

Every path is compared with one that needs no GPU, or with its own plain form there: families, compiled steps,
hand-written passes, experts, adapters, optimizers, text, checkpoints. Whole commands run meanwhile, as processes of
their own. On a CPU (a tiny run) the same code compares a CPU with itself, and what cannot be had there is named.

Errors are relative: of a loss |a - b| / |b|, of a gradient ||a - b|| / ||b|| over all of its numbers together. The norm
that a single parameter's is divided by is at least a hundredth of the largest, since the biases of keys have no
gradient but rounding.
"""

import contextlib
import copy
import functools
import hashlib
import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from gptworks.core import folder, runtime
from gptworks.core.config import Adapter, Train
from gptworks.core.errors import OutOfMemory
from gptworks.core.ranks import ranks
from gptworks.data.loader import Batch, Loader
from gptworks.data.shards import Stream
from gptworks.data.tokenizer import Tokenizer
from gptworks.infer.engine import Engine
from gptworks.infer.sampling import Sampling
from gptworks.model import adapters, build, kernels
from gptworks.model import config as architecture
from gptworks.model.config import ModelConfig
from gptworks.model.experts import SparseMLP, grouped
from gptworks.model.families import FAMILIES, from_hf_config
from gptworks.model.transformer import Transformer
from gptworks.train import loop
from gptworks.train.objectives import NextToken
from gptworks.train.optim import OPTIMIZERS, make_optimizers, orthogonalise
from gptworks.train.schedule import Course
from gptworks.train.state import Saving, State, restore
from gpu_parts.sheet import Missing, Sheet

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def run(sheet: Sheet) -> None:
    """All checks, in the order of their worth, while commands run and models are compiled beside them."""
    place = sheet.out / "right"
    shutil.rmtree(place, ignore_errors=True)  # of a run before
    place.mkdir()
    torch.set_float32_matmul_precision("highest")  # no TF32: the default, and what is promised
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for `repeatable`, before a product is made
    checks: list[tuple[str, Callable[[], None], float]] = [
        ("families", lambda: families(sheet), 6),
        ("text of the families", lambda: text_of_families(sheet), 5),
        ("hand-written passes", lambda: passes(sheet), 3),
        ("products in float8", lambda: float8(sheet), 2),
        ("experts", lambda: experts(sheet), 2),
        ("adapters", lambda: lora(sheet), 4),
        ("Muon's matrices", lambda: muon(sheet), 1),
        ("steps of the optimizers", lambda: optimizers(sheet), 2),
        ("a step in fp16", lambda: loop_in_fp16(sheet), 2),
        ("repeatable steps", lambda: repeatable(sheet), 3),
        ("a checkpoint beside the training", lambda: checkpoint(sheet, place / "checkpoints"), 2),
        ("a group of one process", lambda: group(sheet), 4),
        ("out of memory in a step", lambda: exhausted(sheet), 3),
    ]
    with Commands(sheet, place) as commands, Compilers(sheet) as compilers:
        commands.start()
        compilers.start()
        for name, work, needs in checks:
            sheet.attempt(name, work, needs)
        for name, found in (
            ("killed and continued", commands.continued),
            ("verify", commands.verified),
            ("torchrun", commands.launched),
            ("text of a trained model", commands.text),
            ("refused for want of memory", commands.refused),
            ("the tests that need a GPU", commands.tested),
        ):
            sheet.attempt(name, found, -60)  # what is done is told, though the time be over
        compilers.wait()


# -- tiny models -------------------------------------------------------------------------------------------------

CONTEXT, WINDOW = 64, 8
PROMPT = "the king and queen"
# Sizes are multiples of 16, as the fast kernels want them; the vocabulary is not, as that of bytes is not.
SIZES: dict[str, Any] = {
    "vocab_size": 259, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
}  # fmt: skip
GROUPED = {"num_key_value_heads": 2}
SLIDING = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
MIXED = ["sliding_attention", "full_attention"]
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 60}  # fmt: skip
# What a config.json of each family says beside the sizes, so that each part of the decoder is in some of them.
PARTS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
             "resid_pdrop": 0.0},
    "gpt_neox": {"rotary_pct": 0.5},
    "llama": GROUPED | {"rope_parameters": LLAMA3, "mlp_bias": True, "tie_word_embeddings": True},
    "mistral": GROUPED | {"sliding_window": WINDOW},
    "phi3": GROUPED | {"sliding_window": WINDOW},
    "qwen2": GROUPED | SLIDING,
    "qwen3": GROUPED | {"head_dim": 32, "tie_word_embeddings": True},
    "qwen3_moe": GROUPED | {"head_dim": 16, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
                            "norm_topk_prob": True},
    "mixtral": GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmo2": GROUPED,
    "gemma2": GROUPED | {"head_dim": 32, "sliding_window": WINDOW, "query_pre_attn_scalar": 20,
                         "attn_logit_softcapping": 5.0, "final_logit_softcapping": 5.0},
    "gemma3_text": GROUPED | {"head_dim": 16, "sliding_window": WINDOW, "query_pre_attn_scalar": 20,
                              "layer_types": MIXED},
}  # fmt: skip


def config_of(family: str, **parts: Any) -> ModelConfig:
    return from_hf_config({"model_type": family, **SIZES, **PARTS[family], **parts})


def model_of(config: ModelConfig, seed: int = 1) -> Transformer:
    """Random in every parameter, so that no norm hides behind a one and no bias behind a zero."""
    made = build.fresh(config, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * (0.1 if parameter.ndim < 2 else 0.02))
    return made.train()


def batches(rows: int = 2) -> list[Batch]:
    """A batch as it comes, and one of documents; some targets weigh nothing."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(SIZES["vocab_size"], (rows, CONTEXT + 1), generator=generator)
    weights = (torch.rand(rows, CONTEXT, generator=generator) < 0.9).float()
    cuts = torch.tensor([[5, 20, 41], [0, 33, 50]])[:, None]  # where documents begin
    segments = (torch.arange(CONTEXT)[:, None] >= cuts).sum(-1).int()[:rows]
    whole = Batch(ids[:, :-1], ids[:, 1:], weights)
    return [whole, replace(whole, segments=segments)]


# -- differences -------------------------------------------------------------------------------------------------

Made = tuple[float, dict[str, Tensor]]  # a loss, and gradients or what else is compared, by name


@dataclass(frozen=True)
class Gap:
    """How far two results are apart (see above)."""

    loss: float
    whole: float  # of all tensors together
    single: float  # of the one that is furthest
    name: str  # which that is


def gap(found: Made, wanted: Made) -> Gap:
    """NaN and infinity count as infinitely far."""
    apart = {name: norm(found[1][name].double() - value.double()) for name, value in wanted[1].items()}
    norms = {name: norm(value) for name, value in wanted[1].items()}
    assert apart.keys() == found[1].keys() and max(norms.values()) > 0
    largest, total = max(norms.values()), sum(n * n for n in norms.values()) ** 0.5
    singles = {name: apart[name] / max(norms[name], largest / 100) for name in apart}
    worst = max(singles, key=lambda name: singles[name])
    whole = sum(a * a for a in apart.values()) ** 0.5 / total
    return Gap(finite(abs(found[0] - wanted[0]) / abs(wanted[0])), whole, singles[worst], worst)


def norm(x: Tensor) -> float:
    return finite(float(x.detach().double().norm()))


def finite(value: float) -> float:
    return value if value < float("inf") else float("inf")


@dataclass(frozen=True)
class Bounds:
    """The most that is right."""

    loss: float
    whole: float
    single: float

    def share(self, gap: Gap) -> float:
        """The largest of the differences, each as a share of its bound."""
        return max(gap.loss / self.loss, gap.whole / self.whole, gap.single / self.single)

    def __str__(self) -> str:
        return f"loss {self.loss:.0e}, gradient {self.whole:.0e}, a parameter's {self.single:.0e}"


# In low precision twice or more what a CPU's own bf16 and fp16 come to beside its fp32, with the same models.
BOUNDS = {
    "fp32": Bounds(1e-5, 1e-5, 1e-4),
    "bf16": Bounds(2e-3, 5e-2, 1e-1),
    "fp16": Bounds(5e-4, 1e-2, 2e-2),
}
SUMMED = Bounds(1e-5, 1e-4, 1e-3)  # of fp32 over some steps, whose weights were rounded each time
EIGHTH = Bounds(2e-2, 0.4, 0.6)  # of float8, by what a CPU's comes to; a wrong scale would be off by more than all


def judge(sheet: Sheet, name: str, gaps: dict[str, Gap], bounds: Bounds, **facts: Any) -> None:
    """A row for several cases: the worst of them is shown, all are kept."""
    worst = max(gaps, key=lambda case: bounds.share(gaps[case]))
    far = gaps[worst]
    shown = f"{worst}: loss {far.loss:.1e}, gradient {far.whole:.1e}, {far.name} {far.single:.1e}"
    verdict = "right" if bounds.share(far) <= 1 else "WRONG"
    kept = {case: [found.loss, found.whole, found.single, found.name] for case, found in gaps.items()}
    sheet.row(name, shown, str(bounds), verdict, cases=kept, **facts)


def measured(model: Transformer, dtype: torch.dtype, device: torch.device) -> Made:
    """The sum of losses over both batches and its gradient, on the CPU; by all parts that a loss may have."""
    model = copy.deepcopy(model).to(device)
    model.dtype = dtype
    objective = NextToken(Train(label_smoothing=0.1, z_loss=1e-3, router_z_loss=1e-3))
    total = 0.0
    for batch in batches():
        loss = objective.loss_sum(model, batch.to(device))
        loss.backward()
        total += float(loss.detach())
    return total, {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}


# -- families ----------------------------------------------------------------------------------------------------


def families(sheet: Sheet) -> None:
    """Losses and gradients of every family against the CPU's in float32. In low precision tokens go to the experts that
    float32 chose: where two are about as likely, rounding decides, and another expert is no small difference."""
    gaps: dict[str, dict[str, Gap]] = {name: {} for name in DTYPES}
    turned: dict[str, float] = {}
    for family in FAMILIES:
        model, chosen = model_of(config_of(family)), list[Tensor]()
        with noted(chosen):
            wanted = measured(model, torch.float32, CPU)
        for name, dtype in DTYPES.items():
            with held(chosen) if name != "fp32" else contextlib.nullcontext([]) as changes:
                gaps[name][family] = gap(measured(model, dtype, sheet.device), wanted)
            if changes:
                turned[f"{family} {name}"] = sum(changes) / len(changes)
    for name, found in gaps.items():
        judge(sheet, f"{len(found)} families in {name} against the CPU's fp32", found, BOUNDS[name], turned=turned)


@contextlib.contextmanager
def noted(chosen: list[Tensor]) -> Iterator[None]:
    """Notes down the experts of every token."""
    own = SparseMLP.choose

    def choose(self: SparseMLP, logits: Tensor) -> tuple[Tensor, Tensor]:
        shares, numbers = own(self, logits)
        chosen.append(numbers.cpu())
        return shares, numbers

    with mock.patch.object(SparseMLP, "choose", choose):
        yield


@contextlib.contextmanager
def held(chosen: list[Tensor]) -> Iterator[list[float]]:
    """Sends tokens to the experts that were noted down. Gives what share of them would have gone elsewhere."""
    own, turned, waiting = SparseMLP.choose, list[float](), iter(chosen)

    def choose(self: SparseMLP, logits: Tensor) -> tuple[Tensor, Tensor]:
        here, numbers = own(self, logits)[1], next(waiting).to(logits.device)
        turned.append(float((here.sort(-1).values != numbers.sort(-1).values).any(-1).float().mean()))
        shares = torch.softmax(logits.float(), -1).gather(-1, numbers)
        return (shares / shares.sum(-1, keepdim=True) if self.normalise else shares), numbers

    with mock.patch.object(SparseMLP, "choose", choose):
        yield turned


def text_of_families(sheet: Sheet) -> None:
    """Greedy text in fp32, longer than the context, so that the cache grows, ends and begins anew."""
    tokenizer, different = Tokenizer.of_bytes(), dict[str, tuple[int, float]]()
    length = 12 if sheet.tiny else CONTEXT + WINDOW
    for family in FAMILIES:
        model = model_of(config_of(family)).eval()
        found, wanted = (greedy(copy.deepcopy(model).to(to), tokenizer, length) for to in (sheet.device, CPU))
        if found != wanted:
            place = next(i for i in range(length) if found[i] != wanted[i])
            different[family] = (place, lead(model, [*tokenizer.encode(PROMPT), *wanted[:place]]))
    shown = ", ".join(f"{family} from token {place}, {ahead:.0e} ahead" for family, (place, ahead) in different.items())
    verdict = "WRONG" if any(ahead > 1e-4 for _, ahead in different.values()) else "right"
    name = f"greedy text of {len(FAMILIES)} families, {length} tokens, against the CPU's"
    sheet.row(name, shown or "the same", "the same but where two scores are", verdict, different=different)


@torch.no_grad()
def lead(model: Transformer, ids: list[int]) -> float:
    """By how much the likeliest next token is ahead of the second."""
    if len(ids) > CONTEXT:
        return float("inf")  # the context began anew, and not here
    first, second = model.logits(model(torch.tensor([ids]))[0, -1]).topk(2).values.tolist()
    return first - second


def greedy(model: Transformer, tokenizer: Tokenizer, tokens: int) -> list[int]:
    return Engine(model, tokenizer, ()).generate(PROMPT, Sampling(temperature=0), tokens).tokens


# -- steps of the loop, compiled and not -------------------------------------------------------------------------


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
        code = "import sys; from gpu_parts import right; right.compile_some(*sys.argv[1:])"
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


@dataclass(frozen=True)
class Steps:
    """A few steps of the loop: their losses, and how far each parameter moved."""

    losses: list[float]
    moved: dict[str, Tensor]
    state: State

    @property
    def made(self) -> Made:
        return self.losses[-1], self.moved


def settings(**values: Any) -> Train:
    """Plain gradient descent moves the weights as far as the gradient says, so that weights are compared as gradients
    are. (Adam moves each by about as much, however small its gradient, and so by the sign of rounding errors.)"""
    usual = {"optimizer": "sgd", "lr": 0.1, "momentum": 0.0, "weight_decay": 0.0, "warmup": 0.0, "clip": 0.0,
             "schedule": "constant", "max_steps": 100}  # fmt: skip
    return Train.model_validate({**usual, **values})


def stream() -> Stream:
    """Random ids in documents, from a few tokens to more than a row."""
    draw, starts, size = np.random.default_rng(3), [], 0
    for _ in range(40):
        starts.append(size)
        size += int(draw.integers(5, CONTEXT + 20))
    ids = draw.integers(0, SIZES["vocab_size"], size).astype(np.uint16)
    return Stream(ids, np.array(starts, dtype=np.int64), size)


def steps(
    model: Transformer,
    dtype: torch.dtype,
    device: torch.device,
    compile: bool = False,
    documents: bool = False,
    until: int = 3,
    context: int = CONTEXT,
    hooks: Sequence[loop.Hook] = (),
    **values: Any,
) -> Steps:
    """Trains a copy of a model by the loop, two micro-batches a step."""
    train, model = settings(**values), adapters.copy_of(model).to(device)
    state = State(model, make_optimizers(model, train))
    before = {name: p.detach().clone() for name, p in state.trained().items()}
    losses: list[float] = []

    def note(state: State, m: loop.StepMetrics) -> None:
        losses.append(m.loss)

    loop.run(
        state, Loader(stream(), context, 4, 1, mask_documents=documents), NextToken(train), train,
        loop.Layout(device, dtype, micro_batch=2, compile=compile), Course(train), [note, *hooks], until=until,
    )  # fmt: skip
    return Steps(losses, {name: (p.detach() - before[name]).cpu() for name, p in state.trained().items()}, state)


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
        model.use_float8()
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


# -- hand-written passes -----------------------------------------------------------------------------------------


def passes(sheet: Sheet) -> None:
    """Each pass of `kernels` against its plain form on the same device, with more chunks than one, vocabularies that no
    kernel likes, smoothing, z-loss and a cap."""
    device = sheet.device
    generator = torch.Generator().manual_seed(1)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    angles = drawn(1, 48, 1, 16)
    table = (angles.cos(), angles.sin())
    weight, rows = drawn(32).abs() + 0.5, 1100
    targets = {size: torch.randint(size, (rows,), generator=generator).to(device) for size in (259, 320)}
    weights = torch.rand(rows, generator=generator).to(device)
    weights[:5] = 0
    options: list[dict[str, float]] = [{}, {"label_smoothing": 0.2, "z_loss": 0.1}, {"z_loss": 0.01, "cap": 2.0},
                                       {"label_smoothing": 0.1, "z_loss": 0.1, "cap": 0.5}]  # fmt: skip
    chunk = 1 << 17  # bytes of logits, so that the rows are more chunks than one
    small = mock.patch.dict(architecture.LOGITS_BYTES, {device.type: chunk})
    for name, dtype in DTYPES.items():
        cases: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {
            "rms_norm": (lambda x, w: kernels.rms_norm(x, w, 1e-6), [drawn(3, 48, 4, 32).to(dtype), weight]),
            "rotate": (lambda x: kernels.rotate(x, table), [drawn(3, 48, 4, 32).to(dtype)]),
            "rotate half": (lambda x: kernels.rotate(x, table), [drawn(3, 48, 4, 64).to(dtype)]),
        }
        for size, wanted in targets.items():
            for option in options:
                loss = functools.partial(head_loss, targets=wanted, weights=weights, **option)
                cases[f"head of {size} {option}"] = (loss, [drawn(rows, 64).to(dtype), drawn(size, 64)])
        with small:
            gaps = {case: against_plain(made, inputs) for case, (made, inputs) in cases.items()}
        near = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 4e-3}[name]
        judge(sheet, f"hand-written passes in {name} against the plain ones", gaps, Bounds(near, near, near))


def head_loss(hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor, **option: float) -> Tensor:
    assert len(kernels._chunks(len(hidden), head)) > 1
    return kernels.cross_entropy_sum(hidden, head, targets, weights, **option)


def against_plain(made: Callable[..., Tensor], inputs: list[Tensor]) -> Gap:
    found = []
    for fused in (True, False):
        with mock.patch.object(kernels, "FUSED", fused):
            leaves = [x.detach().clone().requires_grad_() for x in inputs]
            value = made(*leaves)
            torch.manual_seed(5)
            value.backward(torch.randn(value.shape).to(value) if value.ndim else None)
            tensors = {f"gradient {i}": leaf.grad.cpu() for i, leaf in enumerate(leaves) if leaf.grad is not None}
            found.append((norm(value.detach()), {"value": value.detach().cpu(), **tensors}))
    return gap(found[0], found[1])


def float8(sheet: Sheet) -> None:
    """Products in float8 against exact ones, then steps of a model that trains in it against bf16's."""
    if sheet.device.type == "cuda" and not runtime.has_float8(sheet.device):
        raise Missing(f"{torch.cuda.get_device_name()} has no float8 units")
    generator = torch.Generator().manual_seed(1)
    x, weight, grad = (torch.randn(shape, generator=generator) for shape in ((2, 32, 48), (64, 48), (2, 32, 64)))
    x[0, 0, 0] = 30.0  # the scale is a tensor's own, so one large value costs the others precision
    leaves = [x.to(sheet.device, torch.bfloat16).requires_grad_(), weight.to(sheet.device, copy=True).requires_grad_()]
    y = kernels.linear_float8(*leaves)
    y.backward(grad.to(y))
    exact = [x @ weight.T, grad @ weight, grad.flatten(0, 1).T @ x.flatten(0, 1)]
    apart = [
        norm(a.detach().cpu().float() - b) / norm(b)
        for a, b in zip([y, *(leaf.grad for leaf in leaves)], exact, strict=True)
    ]
    # Three bits of a mantissa are off by up to 1/16, and by 1/35 on average; two, in a gradient, by twice that.
    sheet.check("products in float8 against exact ones", max(apart), 0.08, each=apart)
    model = model_of(config_of("qwen3"))
    wanted = steps(model, torch.bfloat16, sheet.device)
    model.use_float8()
    found = steps(model, torch.bfloat16, sheet.device)
    assert found.losses != wanted.losses, "nothing was multiplied in float8"
    judge(sheet, "3 steps in float8 against bf16", {"qwen3": gap(found.made, wanted.made)}, EIGHTH)


# -- experts, adapters, optimizers -------------------------------------------------------------------------------


def experts(sheet: Sheet) -> None:
    """Products of experts against the CPU's in fp32, on each path: a kernel for all of them, and one after another.
    Among them are experts that get no token, the first and the last too."""
    sizes = torch.tensor([0, 37, 1, 0, 0, 160, 59, 0])
    generator = torch.Generator().manual_seed(1)
    count, kinds = int(sizes.sum()), ("product", "of tokens", "of weights")
    for name, dtype in DTYPES.items():
        gaps, idle = dict[str, Gap](), 0.0
        for what, inner, width in (("aligned", 48, 64), ("not aligned", 20, 36)):
            shapes = (count, width), (len(sizes), inner, width), (count, inner)
            x, weights, grad = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
            found = []
            for device, kind in ((sheet.device, dtype), (CPU, torch.float32)):
                leaves = [value.to(device, kind, copy=True).requires_grad_() for value in (x, weights)]
                ends = sizes.cumsum(0).int().to(device)
                spoilt(device)
                y = grouped(leaves[0], leaves[1], ends)
                y.backward(grad.to(device, kind))
                tensors = [t.cpu() for t in (y.detach(), leaves[0].grad, leaves[1].grad) if t is not None]
                found.append((norm(tensors[0]), dict(zip(kinds, tensors, strict=True))))
            gaps[what] = gap(found[0], found[1])
            idle = max(idle, finite(float(found[0][1]["of weights"][sizes == 0].abs().max())))
        near = {"fp32": 1e-5, "bf16": 1e-2, "fp16": 2e-3}[name]
        judge(sheet, f"products of experts in {name} against the CPU's fp32", gaps, Bounds(near, near, near))
        sheet.check(f"the gradient of an expert without a token in {name}", idle, 0.0)


def spoilt(device: torch.device) -> None:
    """Leaves NaN in the memory that the next tensors get, so that what a kernel does not write is seen."""
    left = [torch.full((size,), float("nan"), device=device) for size in (1 << 8, 1 << 12, 1 << 14, 1 << 16) * 4]
    del left


def lora(sheet: Sheet) -> None:
    """Losses and gradients of adapters against the CPU's in fp32 beside the same frozen codes."""
    kinds: dict[str, dict[str, Any]] = {base: {"base": base} for base in ("fp32", "bf16", "int8", "int4", "nf4")}
    kinds |= {"fp32, DoRA": {"base": "fp32", "use_dora": True}, "nf4, DoRA": {"base": "nf4", "use_dora": True}}
    gaps: dict[str, dict[str, Gap]] = {name: {} for name in DTYPES}
    for kind, values in list(kinds.items())[-2:] if sheet.tiny else kinds.items():
        model = adapted(model_of(config_of("qwen2")), **values)
        wanted = measured(model, torch.float32, CPU)
        for name in gaps:
            gaps[name][kind] = gap(measured(model, DTYPES[name], sheet.device), wanted)
    for name, found in gaps.items():
        judge(sheet, f"adapters in {name} against the CPU's fp32, by their base", found, BOUNDS[name])


def adapted(model: Transformer, **values: Any) -> Transformer:
    """A model with adapters none of whose matrices is zero, or their partners would have no gradient."""
    made = adapters.attach(model, Adapter(kind="lora", rank=8, **values), 1).train()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for layer in adapters.adapters(made).values():
            layer.lora_B.add_(torch.randn(layer.lora_B.shape, generator=generator) * 0.02)
    return made


def muon(sheet: Sheet) -> None:
    """The singular values that Muon gives, of matrices whose own are from 0.003 of their norm up."""
    generator = torch.Generator().manual_seed(1)
    gaussian = torch.randn(4, 64, 128, generator=generator)
    steep = torch.linalg.svd(torch.randn(4, 32, 96, generator=generator), full_matrices=False)
    matrices = {"gaussian": gaussian, "steep": steep.U * torch.logspace(0, -2.2, 32) @ steep.Vh}
    # In exact arithmetic no value is further than 0.21 from 1; rounded to bf16 between the products, as emulated on a
    # CPU, they come to 0.26 and 0.39.
    for name, bound in (("gaussian", 0.35), ("steep", 0.5)):
        made = torch.linalg.svdvals(orthogonalise(matrices[name].to(sheet.device)).cpu().double())
        far, values = finite(float((made - 1).abs().max())), [float(made.min()), float(made.max())]
        sheet.check(f"singular values of Muon's {name} matrices, distance from 1", far, bound, values=values)


def optimizers(sheet: Sheet) -> None:
    """Two steps of each optimizer, from the same gradients, against the CPU's."""
    model = model_of(config_of("qwen3"))
    gaps: dict[str, Gap] = {}
    for name in OPTIMIZERS:
        train = Train(optimizer=name, lr=0.02, adam_lr=0.01, momentum=0.9, weight_decay=0.1)
        found = []
        for device in (sheet.device, CPU):
            here = copy.deepcopy(model).to(device)
            made, generator = make_optimizers(here, train), torch.Generator().manual_seed(3)
            for _ in range(2):
                for parameter in here.parameters():
                    parameter.grad = torch.randn(parameter.shape, generator=generator).to(device)
                for optimizer in made:
                    optimizer.step()
            parameters = dict(model.named_parameters())
            moved = {n: p.detach().cpu() - parameters[n].detach() for n, p in here.named_parameters()}
            found.append((1.0, moved))
        gaps[name] = gap(found[0], found[1])
    turned = {"muon": gaps.pop("muon")}
    judge(sheet, "2 steps of optimizers against the CPU's", gaps, Bounds(1e-5, 1e-5, 1e-5))
    judge(sheet, "2 steps of Muon against the CPU's in fp32", turned, Bounds(2e-2, 2e-2, 5e-2))


# -- what a run rests on -----------------------------------------------------------------------------------------


def checkpoint(sheet: Sheet, place: Path) -> None:
    """A checkpoint that is written while the training goes on has the weights of its own step, and the training goes on
    from it as it went."""
    model, kept, begun = model_of(config_of("qwen3")), dict[str, Tensor](), list[Saving]()
    values: dict[str, Any] = {"optimizer": "adamw", "lr": 1e-3}

    def hook(state: State, m: loop.StepMetrics) -> None:
        if state.step == 2:
            kept.update({name: p.detach().cpu().clone() for name, p in state.trained().items()})
            begun.append(Saving(state, place, {}))
            begun[0].start()

    straight = steps(model, torch.float32, sheet.device, until=6, hooks=[hook], **values)
    path = begun[0].finish()
    folder.verify(path)
    train, opened = settings(**values), copy.deepcopy(model).to(sheet.device)
    state = State(opened, make_optimizers(opened, train))
    restore(state, path)
    assert state.step == 2, f"it stands at step {state.step}"
    different = [name for name, p in state.trained().items() if not torch.equal(p.detach().cpu(), kept[name])]
    loop.run(state, Loader(stream(), CONTEXT, 4, 1), NextToken(train), train,
             loop.Layout(sheet.device, torch.float32, 2), Course(train), until=6)  # fmt: skip
    moved = {name: p.detach().cpu() - kept[name] for name, p in state.trained().items()}
    whole = {name: p.detach().cpu() - kept[name] for name, p in straight.state.trained().items()}
    apart = gap((1.0, moved), (1.0, whole)).whole
    shown = f"{len(different)} of {len(kept)} weights differ; the next 4 steps are {apart:.1e} apart"
    sheet.row("a checkpoint written beside the training, opened", shown, "none, and at most 1e-03",
              "WRONG" if different or not apart <= 1e-3 else "right", different=different, apart=apart)  # fmt: skip


def repeatable(sheet: Sheet) -> None:
    """Whether steps give the same bits again, as `train.deterministic=true` has them computed. In bf16 they have to; by
    other kernels of attention torch promises it only where it refuses all that is not, and we have it warn."""
    long, times = (CONTEXT, 2) if sheet.tiny else (512, 3)  # tokens, enough for kernels to share the sum over them
    kinds = (("bf16", False), ("fp16", False), ("fp32", False), ("bf16", True))
    cases = {
        dtype + ", documents" * documents: (dtype, documents) for dtype, documents in kinds[: 1 if sheet.tiny else None]
    }
    model, same = model_of(config_of("qwen3", max_position_embeddings=long)), dict[str, bool]()
    torch.set_deterministic_debug_mode("warn")
    try:
        for name, (dtype, documents) in cases.items():
            made = [steps(model, DTYPES[dtype], sheet.device, False, documents, times, long) for _ in range(times)]
            moved = [(one.losses, one.moved) for one in made]
            same[name] = all(
                losses == moved[0][0] and all(torch.equal(moved[0][1][n], other[n]) for n in other)
                for losses, other in moved[1:]
            )
    finally:
        torch.set_deterministic_debug_mode("default")
    shown = ", ".join(f"{name} {'yes' if same[name] else 'no'}" for name in same)
    sheet.row("deterministic steps, the same bits each time", shown, "bf16", "right" if same["bf16"] else "WRONG",
              same=same)  # fmt: skip


def group(sheet: Sheet) -> None:
    """What processes do together, on the one that one GPU allows, by the library that several would have."""
    import torch.distributed as dist

    backend = "nccl" if sheet.device.type == "cuda" else "gloo"
    if not dist.is_available() or (backend == "nccl" and not dist.is_nccl_available()):
        raise Missing(f"this torch has no {backend}")
    if sheet.device.type == "cuda":
        torch.cuda.set_device(torch.cuda.current_device())
    alone = steps(model_of(config_of("gpt2")), torch.float32, sheet.device)
    with mock.patch.dict(os.environ, {"GLOO_SOCKET_IFNAME": "lo"}):
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        with mock.patch.multiple(ranks, started=True, _device=sheet.device):
            together = steps(model_of(config_of("gpt2")), torch.float32, sheet.device)
            x = torch.randn(3, 16, 32, generator=torch.Generator().manual_seed(1)).to(sheet.device)
            shared = norm((ranks.shared(orthogonalise, x) - orthogonalise(x)).cpu())
            assert ranks.total(1.5, 2.5) == [1.5, 2.5] and ranks.agree("text") == "text"
            ranks.barrier()
    finally:
        dist.destroy_process_group()
    far = gap(together.made, alone.made)
    sheet.check(f"3 steps in a group of one ({backend}) against none", max(far.loss, far.whole, shared), SUMMED.whole)


def exhausted(sheet: Sheet) -> None:
    """A step that finds no memory ends as one that a person can read, and smaller ones go on in the same process."""
    config = config_of("qwen3", max_position_embeddings=1024)
    train, rows = settings(), 64
    model = build.fresh(config, 1).to(sheet.device)
    data = Stream(np.arange(100_000) % SIZES["vocab_size"], np.zeros(1, dtype=np.int64), 100_000)

    def train_on(rows: int, objective: NextToken) -> None:
        state = State(model, make_optimizers(model, train))
        layout = loop.Layout(sheet.device, torch.float32 if sheet.tiny else torch.bfloat16, rows)
        loop.run(state, Loader(data, 1024, rows, 1), objective, train, layout, Course(train), until=1)

    said = ""
    objective = NextToken(train) if sheet.device.type == "cuda" else Greedy(train)
    with memory_left(sheet.device, 200 << 20):  # 64 rows take several times that
        try:
            train_on(rows, objective)
        except OutOfMemory as error:
            said = str(error)
            assert error.code == 77
    right = f"train.micro_batch={rows // 2}" in said
    shown = said or "no error"
    sheet.row("out of memory in a step", shown, "exit 77 and what to change", "right" if right else "WRONG")
    model.zero_grad(set_to_none=True)
    train_on(1, NextToken(train))


class Greedy(NextToken):
    """Asks for more than any machine has."""

    def loss_sum(self, model: Transformer, batch: Batch) -> Tensor:
        return torch.empty(1 << 50, device=batch.tokens.device)


@contextlib.contextmanager
def memory_left(device: torch.device, size: int) -> Iterator[None]:
    """Leaves this process so many bytes beside what it holds on a GPU, while the block runs."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + size) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()


# -- whole commands ----------------------------------------------------------------------------------------------

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
