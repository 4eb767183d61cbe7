"""Tiny models, texts and batches for tests that need no run folder."""

import os
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gptworks.core.config import Chosen, ChosenTrain, Config, Model
from gptworks.data.loader import Loader
from gptworks.data.shards import Stream
from gptworks.data.tokenizer import Tokenizer
from gptworks.model import build, kernels, transformer
from gptworks.model.config import ModelConfig, build_config
from gptworks.model.transformer import Transformer
from gptworks.planning.choices import Facts, Measured
from gptworks.planning.choose import choose
from gptworks.planning.machine import Machine
from gptworks.training import loop
from gptworks.training.objectives import NextToken
from gptworks.training.optim import make_optimizers
from gptworks.training.schedule import RunSchedule
from gptworks.training.state import State

ALPHABET = "abcdefghijklmnopqrstuvwxyz ,.\n"
CONTEXT = 32
LAYOUT = loop.Layout(torch.device("cpu"), torch.float32, micro_batch=8)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """One thread, fp32, and whatever a run set process-wide put back."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.set_deterministic_debug_mode(0)


def text(characters: int, seed: int = 0) -> str:
    """Words of a small language, a pure function of its arguments."""
    draw = random.Random(seed)
    words = ["the", "sea", "was", "grey", "and", "old", "king", "sang", "to", "a", "bird", "of", "stone"]
    made = ""
    while len(made) < characters:
        made += draw.choice(words) + draw.choice(["  ", " ", " ", ", ", ".\n"])[-2:]
    return made[:characters]


def tokenizer() -> Tokenizer:
    return Tokenizer.train_characters(ALPHABET)


def shape(vocab_size: int = 32, context: int = CONTEXT, **parts: Any) -> ModelConfig:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return build_config(Model(**{**sizes, **parts}), vocab_size, context)


def model(seed: int = 1, vocab_size: int = 32, context: int = CONTEXT, **parts: Any) -> Transformer:
    """Random weights everywhere, norms and biases too, so that no term is hidden by a zero or a one."""
    made = build.fresh(shape(vocab_size, context, **parts), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return made.eval()


def tokens(rows: int, length: int, vocab_size: int = 31, seed: int = 0) -> Tensor:
    return torch.randint(vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


def stream(documents: int = 12, characters: int = 400, seed: int = 0) -> Stream:
    """Documents of ragged length, each after a start token."""
    tok, ids, starts, size = tokenizer(), list[int](), list[int](), 0
    draw = random.Random(seed)
    for number in range(documents):
        written = text(draw.randint(characters // 10, characters), seed * 1000 + number)
        starts.append(len(ids))
        ids += [tok.start_id or 0, *tok.encode(written)]
        size += len(written.encode())
    return Stream(np.array(ids, dtype=np.uint16), np.array(starts, dtype=np.int64), size)


def settings(**values: Any) -> ChosenTrain:
    """Training settings with what would otherwise be chosen."""
    usual = {
        "optimizer": "adamw", "lr": 3e-3, "adam_lr": 3e-3, "momentum": 0.9, "weight_decay": 0.1, "warmup": 0.1,
        "batch_tokens": 8 * CONTEXT, "micro_batch": 8, "context": CONTEXT, "max_steps": 12, "precision": "fp32",
        "compile": False, "deterministic": True, "threads": 1, "workers": 1, "checkpoint_every": 12, "eval_every": 12,
        "log_every": 1,
    }  # fmt: skip
    return ChosenTrain.model_validate({**usual, **values})


MACHINE = Machine(
    device="cpu", name="a processor", threads=2, memory=8 * 10**9, matmul={"fp32": 1e11, "bf16": 2e11}, bf16=False,
    fp16=False, fp8=False, compiles=True,
)  # fmt: skip


def chosen_config(**sections: Any) -> Config:
    """A configuration of a tiny model that leaves all else open."""
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return Config.model_validate({"model": shape, **sections})


def chosen(config: Config, **facts: Any) -> Chosen:
    """What is chosen for a text of a million tokens on a machine that is no particular one."""
    known = {"vocab_size": 300, "epoch_tokens": 10**6, "measured": Measured(31250, 0.01, 0.1, 100.0), **facts}
    return choose(config, Facts(**known), MACHINE).chosen


def state(train: ChosenTrain, **parts: Any) -> State:
    made = build.fresh(shape(**parts).with_dropout(parts.get("dropout") or 0.0), train.seed)
    return State(made, make_optimizers(made, train))


def loader(rows: int | None = 8, **options: Any) -> Loader:
    return Loader(stream(), CONTEXT, rows, seed=options.pop("seed", 1), **options)


def run(started: State, train: ChosenTrain, until: int, total: int = 12, micro_batch: int = 8, **options: Any) -> State:
    layout = loop.Layout(torch.device("cpu"), options.pop("dtype", torch.float32), micro_batch)
    course = RunSchedule(train.model_copy(update={"max_steps": total}))
    objective = options.pop("objective", None) or NextToken(train)
    rows = options.pop("loader", None) or loader()
    return loop.run(started, rows, objective, train=train, layout=layout, schedule=course, until=until, **options)


def compile_with(monkeypatch: pytest.MonkeyPatch, backend: Any) -> None:
    """Has that backend take what is compiled: to generate code takes a C++ compiler and half a minute."""
    torch.compiler.reset()
    block = torch.compile(transformer._apply, backend=backend, dynamic=False)
    loss = torch.compile(kernels._loss_and_gradient, backend=backend)
    monkeypatch.setattr(transformer, "_compiled", lambda: block)
    monkeypatch.setattr(kernels, "_compiled_loss_and_gradient", lambda: loss)


def examples(number: int) -> int:
    """The examples of a property that hypothesis draws: a quarter of them in `make test`, all in `make test-slow`."""
    return number if os.environ.get("GPTWORKS_EXAMPLES") == "all" else max(number // 4, 20)
