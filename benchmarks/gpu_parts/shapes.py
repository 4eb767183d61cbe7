"""Runs over random ids, decided as `gptworks train` decides them, for the parts that measure speed and memory."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gptworks.core import runtime
from gptworks.core.config import build
from gptworks.data.shards import Shards, Stream
from gptworks.model.transformer import Transformer
from gptworks.training import loop
from gptworks.training.assemble import Run
from gptworks.training.decide import Decided, decide
from gptworks.training.pretraining import Pretraining
from gptworks.training.schedule import RunSchedule

# GPT-2's: width, layers, heads. Its 1.5B has 48 layers of 1600.
SHAPES = {"124M": (768, 12, 12), "350M": (1024, 24, 16), "1.5B": (1600, 48, 25), "tiny": (64, 2, 2)}
VOCABULARY = 50257
DENSE_BF16 = {"H100": 989.4e12, "H200": 989.4e12, "A100": 312e12, "L40": 181e12, "L4": 121e12, "4090": 165.2e12}


class Numbers:
    """A tokenizer that no text is asked of."""

    front: list[int] = []
    eos_id = start_id = None

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def decode(self, ids: Any, skip_control: bool = False) -> str:
        return " ".join(map(str, ids[:8]))


def gpt2(size: str, tokens: int, context: int, **keys: Any) -> dict[str, Any]:
    """The configuration of a GPT-2 of that size with steps of so many tokens; `keys` are of `train`."""
    width, layers, heads = SHAPES[size]
    model = {"family": "gpt2", "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    steady = {"max_steps": 10**6, "lr": 1e-4, "adam_lr": 1e-4, "schedule": "constant", "warmup": 0.0}
    return {
        "data": {"train": "random ids"},
        "model": model,
        "generate": {"prompts": []},
        "train": {"batch_tokens": tokens, "context": context, "optimizer": "adamw", **steady, **keys},
    }


def decided(tree: dict[str, Any], vocabulary: int) -> Decided:
    """What the package chooses for that configuration here: precision, micro-batch, compilation."""
    if runtime.device().type == "cpu":  # a rehearsal, in which a compiler would take most of the time
        tree = tree | {"train": {"compile": False, **tree["train"]}}
    config = build(tree, "the benchmark")
    tokens = config.train.batch_tokens
    assert isinstance(tokens, int)
    ids = np.random.default_rng(1).integers(0, vocabulary, 4 * tokens + 2).astype(np.uint16)
    stream = Stream(ids, np.zeros(1, dtype=np.int64), len(ids))
    files = {f"{split}.tokens": {"sha256": "0" * 64} for split in ("train", "eval")}
    shards = Shards(Path("random"), Numbers(vocabulary), stream, stream, {"files": files})  # type: ignore[arg-type]
    with quick_weights():
        return decide(config, Pretraining(shards), None)


@contextmanager
def quick_weights() -> Iterator[None]:
    """Fresh weights are drawn on the device: by the package's own rule, one number after another on a processor, 1.5
    billion of them take a quarter of a minute. Speed and memory are the same."""
    before, device = Transformer.initialise, runtime.device()

    @torch.no_grad()
    def initialise(model: Transformer, seed: int) -> None:
        model.to(device)
        for parameter in model.parameters():
            parameter.normal_(std=0.02) if parameter.ndim > 1 else parameter.fill_(1.0)

    Transformer.initialise = initialise  # type: ignore[method-assign]
    try:
        yield
    finally:
        Transformer.initialise = before  # type: ignore[method-assign]


def steps(run: Run, count: int) -> list[float]:
    """Seconds of each of so many steps, of which the first has what is done once."""
    seconds: list[float] = []

    def watch(state: Any, m: loop.StepMetrics) -> None:
        seconds.append(m.seconds)

    train, began, work = run.config.train, run.state.step, run.start()
    loop.run(
        run.state, work.batches, work.objective, train=train, layout=run.layout, schedule=RunSchedule(train),
        hooks=[watch], until=began + count,
    )  # fmt: skip
    wait()
    return seconds


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(work: Any, repeats: int = 10) -> float:
    """Seconds of a call, the median of several after two that are not counted; waits for the device."""
    found = []
    for number in range(repeats + 2):
        wait()
        start = time.perf_counter()
        work()
        wait()
        if number >= 2:
            found.append(time.perf_counter() - start)
    return float(np.median(found))


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """FLOP/s of a square product of that size, of random numbers."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    many = 10 if device.type == "cuda" else 1

    def products() -> None:
        for _ in range(many):
            a @ b

    return 2 * size**3 * many / timed(products, 5)


def datasheet(device: torch.device) -> float | None:
    """FLOP/s in bf16 without sparsity that the card's maker writes, for the cards we know."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((rate for card, rate in DENSE_BF16.items() if card in name), None)


def fresh() -> None:
    """Forgets what was compiled and gives memory back, so that one measurement is not another's burden."""
    import gc

    gc.collect()
    if torch.cuda.is_available():
        torch.compiler.reset()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_bytes() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else runtime.peak_memory()
