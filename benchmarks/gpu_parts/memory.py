"""What a step was estimated to need beside what it takes, with the micro-batch that the package chooses."""

from typing import Any

import torch

from gptworks.core import runtime
from gptworks.core.config import Adapter
from gptworks.model import adapters
from gptworks.model.lowbit import scheme
from gptworks.planning.cost import Trainable, step_memory
from gptworks.training.assemble import Run
from gptworks.training.optim import make_optimizers
from gpu_parts import shapes
from gpu_parts.sheet import Sheet

WITHIN = 0.1  # of the estimate; above it never


def estimate(run: Run, part: Trainable | None = None) -> int:
    train, config = run.config.train, run.state.model.config
    assert train.context
    return step_memory(
        config, train.context, train.optimizer, run.layout.dtype.itemsize, run.layout.device.type,
        compiled=run.layout.compile, trainable=part,
    ).of(run.layout.micro_batch)  # fmt: skip


def measure(sheet: Sheet, name: str, tree: dict[str, Any], adapter: str | None = None) -> None:
    """Two steps of a run; on a CPU, whose peak is the process's, for the rehearsal alone."""
    shapes.fresh()
    vocabulary = 512 if sheet.tiny else shapes.VOCABULARY
    run = shapes.decided(tree, vocabulary).run
    part = None
    if adapter:
        options = Adapter(kind="lora", rank=16, base=adapter)
        model = adapters.attach(run.state.model, options, 1).to(sheet.device)
        held = 2.0 if adapter == "bf16" else scheme(adapter).bytes_per_weight(model.config.hidden_size)
        part = Trainable.of(model.config, options, [], held)
        run.state.model, run.state.optimizers = model, make_optimizers(model, run.config.train)
    rows = run.layout.micro_batch
    before = torch.cuda.memory_allocated() if sheet.device.type == "cuda" else 0
    if adapter and sheet.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    shapes.steps(run, 2)
    said = estimate(run, part)
    taken = shapes.peak_bytes()
    off = said / taken - 1
    whole = torch.cuda.mem_get_info()[1] if sheet.device.type == "cuda" else runtime.available_memory(sheet.device)
    reserved = torch.cuda.max_memory_reserved() if sheet.device.type == "cuda" else 0
    right = abs(off) <= WITHIN and max(reserved, taken) < whole
    sheet.row(
        f"memory, {name}",
        f"{said / 1e9:.2f} GB estimated, {taken / 1e9:.2f} taken ({100 * off:+.0f} %); {rows} rows",
        "within 10 %, never over the card's",
        "measured" if sheet.tiny else "reached" if right else "missed",
        estimated=said, taken=taken, reserved=reserved, before=before, micro_batch=rows,
    )  # fmt: skip


def run(sheet: Sheet) -> None:
    small = sheet.tiny

    def gpt2(size: str, tokens: int, context: int, **keys: Any) -> dict[str, Any]:
        return shapes.gpt2("tiny" if small else size, 256 if small else tokens, 64 if small else context, **keys)

    def llama(tokens: int, context: int, **keys: Any) -> dict[str, Any]:
        tree = gpt2("124M", tokens, context, **keys)
        return tree | {"model": tree["model"] | {"family": "qwen3", "num_key_value_heads": 2 if small else 4}}

    cases: dict[str, tuple[dict[str, Any], str | None]] = {}
    for compiled in (False,) if small else (True, False):
        how = "compiled" if compiled else "not compiled"
        cases |= {
            f"124M at 1,024, {how}": (gpt2("124M", 2**17, 1024, compile=compiled), None),
            f"qwen3 at 4,096, muon, {how}": (llama(2**17, 4096, optimizer="muon", compile=compiled), None),
            f"350M at 1,024, {how}": (gpt2("350M", 2**17, 1024, compile=compiled), None),
            f"1.5B at 1,024, {how}": (gpt2("1.5B", 2**16, 1024, compile=compiled), None),
        }
    cases["124M, adapters on bf16"] = (gpt2("124M", 2**17, 1024, compile=False), "bf16")
    cases["124M, adapters on nf4"] = (gpt2("124M", 2**16, 1024, compile=False), "nf4")
    order = sorted(cases, key=lambda name: ("1.5B" in name, "not" in name))
    for name in order:
        tree, adapter = cases[name]
        sheet.attempt(f"memory, {name}", lambda n=name, t=tree, a=adapter: measure(sheet, n, t, a), 3)  # type: ignore[misc]
