"""Shared fixtures: a tiny text and a tiny finished run, made once for the whole session."""

import functools
import gc
import os
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

WORDS = "the king and queen walked slowly over old stones, singing of rain; nobody answered. Where?".split()  # noqa: SIM905

# Dropout is on, so that a comparison of two runs also compares random state.
TINY: dict[str, Any] = {
    "tokenizer.vocab_size": 300,
    "model.family": "qwen3",
    "model.hidden_size": 32,
    "model.num_hidden_layers": 2,
    "model.num_attention_heads": 2,
    "model.dropout": 0.1,
    "train.context": 32,
    "train.batch_tokens": 256,
    "train.max_steps": 12,
    "train.checkpoint_every": 4,
    "train.eval_every": 6,
    "train.log_every": 1,
    "train.precision": "fp32",  # or a run would be compared in bf16 where the processor has it
    "train.threads": 1,
    "train.tensorboard": False,
    "generate.max_new_tokens": 8,
}


def make_text(words: int, seed: int = 0) -> str:
    """English-looking lines, a pure function of its arguments."""
    draw = random.Random(seed)
    return "".join(draw.choice(WORDS) + draw.choice("     \n") for _ in range(words)) + "end\n"


def pytest_collection_finish() -> None:
    """What the tests have imported stays to the end: a collection need not look at it again, hundreds of times."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def machine_timed_once() -> Iterator[None]:
    """Each run times a matmul, half a second in all; here once for each number of threads."""
    import torch

    from gptworks.core import runtime

    real = runtime.matmul_rate
    timed = functools.cache(lambda threads, *arguments: real(*arguments))
    runtime.matmul_rate = lambda *arguments: timed(torch.get_num_threads(), *arguments)
    yield
    runtime.matmul_rate = real


@pytest.fixture(autouse=True)
def small_numbers_kept() -> Iterator[None]:
    """A run has its process flush denormal numbers to zero; the tests that follow in this one want them."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_flush_denormal(False)


@pytest.fixture(scope="session")
def zygote() -> Any:
    """A process that has imported everything and forks: a command, or Python, with a process of its own."""
    from zygote import shared

    return shared()


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "tiny.txt"
    path.write_text(make_text(4000), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_config(tiny_text: Path) -> Callable[..., Any]:
    """A function: dotted overrides -> the Config of a run that takes seconds."""
    from gptworks.core import config

    def make(**overrides: Any) -> Any:
        return config.load(None, {"data.train": str(tiny_text)} | TINY | overrides)

    return make


@pytest.fixture(scope="session")
def tiny_overrides(tiny_text: Path) -> list[str]:
    """The same as command-line arguments, for use beside a built-in recipe's name or an empty recipe file."""

    def spell(value: Any) -> str:
        return str(value).lower() if isinstance(value, bool) else str(value)

    return [f"data.train={tiny_text}"] + [f"{key}={spell(value)}" for key, value in TINY.items()]


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory, tiny_config: Callable[..., Any]) -> Path:
    """A finished run folder. Read only: copy it (`tiny_run`) to change something."""
    from gptworks import lifecycle

    out = tmp_path_factory.mktemp("runs") / "tiny"
    lifecycle.train(tiny_config(), out, "tiny")
    return out


@pytest.fixture
def tiny_run(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to damage."""
    out = tmp_path / "run"
    shutil.copytree(finished_run, out)
    return out
