"""Tiny models of every family, batches, a few steps of the loop, and how far two results are apart.

Errors are relative: of a loss |a - b| / |b|, of a gradient ||a - b|| / ||b|| over all of its numbers together. The norm
that a single parameter's is divided by is at least a hundredth of the largest, since the biases of keys have no
gradient but rounding.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gptworks.core.config import Train
from gptworks.data.batch import Batch
from gptworks.data.loader import Loader
from gptworks.data.shards import Stream
from gptworks.model import build
from gptworks.model.config import ModelConfig
from gptworks.model.families import from_hf_config
from gptworks.model.transformer import Transformer, copy_of
from gptworks.training import loop
from gptworks.training.objectives import NextToken
from gptworks.training.optim import make_optimizers
from gptworks.training.schedule import RunSchedule
from gptworks.training.state import State
from gpu_parts.sheet import Sheet

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

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
        loss = objective.loss(model, batch.to(device)).sum
        loss.backward()
        total += float(loss.detach())
    return total, {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}


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
    train, model = settings(**values), copy_of(model).to(device)
    state = State(model, make_optimizers(model, train))
    before = {name: p.detach().clone() for name, p in state.trained().items()}
    losses: list[float] = []

    def note(state: State, m: loop.StepMetrics) -> None:
        losses.append(m.loss)

    loop.run(
        state, Loader(stream(), context, 4, 1, mask_documents=documents), NextToken(train), train=train,
        layout=loop.Layout(device, dtype, micro_batch=2, compile=compile), schedule=RunSchedule(train),
        hooks=[note, *hooks], until=until,
    )  # fmt: skip
    return Steps(losses, {name: (p.detach() - before[name]).cpu() for name, p in state.trained().items()}, state)
