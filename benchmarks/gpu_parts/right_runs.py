"""What a run rests on: checkpoints, the same bits again, a group of processes, the end of memory."""

import contextlib
import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from gptworks.core import folder
from gptworks.core.errors import OutOfMemory
from gptworks.core.ranks import ranks
from gptworks.data.batch import Batch
from gptworks.data.loader import Loader
from gptworks.data.shards import Stream
from gptworks.model import build
from gptworks.model.transformer import Transformer
from gptworks.training import loop
from gptworks.training.objectives import Loss, NextToken
from gptworks.training.optim import make_optimizers, orthogonalise
from gptworks.training.schedule import RunSchedule
from gptworks.training.state import Saving, State, restore
from gpu_parts.right_models import (
    CONTEXT,
    DTYPES,
    SIZES,
    SUMMED,
    config_of,
    gap,
    model_of,
    norm,
    settings,
    steps,
    stream,
)
from gpu_parts.sheet import Missing, Sheet


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
    loop.run(state, Loader(stream(), CONTEXT, 4, 1), NextToken(train), train=train,
             layout=loop.Layout(sheet.device, torch.float32, 2), schedule=RunSchedule(train), until=6)  # fmt: skip
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
            shared = norm((ranks.map_split(orthogonalise, x) - orthogonalise(x)).cpu())
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
        schedule = RunSchedule(train)
        loop.run(state, Loader(data, 1024, rows, 1), objective, train=train, layout=layout, schedule=schedule, until=1)

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

    def loss(self, model: Transformer, batch: Batch) -> Loss:
        return Loss(torch.empty(1 << 50, device=batch.tokens.device))


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
