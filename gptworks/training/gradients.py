"""The gradient of a step out of micro-batches, threads and processes.

`sum` adds up micro-batch by micro-batch. `canonical` adds in one fixed tree over the micro-batches of the whole
step, halves and halves of halves, of which each process computes a subtree: 1, 2 or 4 processes then agree in every
bit, at the price of one more copy of the gradient for each level of the tree.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

from gptworks.core.config import Train
from gptworks.core.failpoint import failpoint
from gptworks.core.ranks import ranks
from gptworks.core.runtime import seed_everything
from gptworks.data.loader import Batch
from gptworks.model.transformer import Transformer

LossSum = Callable[[Transformer, Batch], Tensor]


@contextmanager
def side_by_side(workers: int) -> Iterator[Executor | None]:
    """Threads that compute micro-batches at the same time and share the processors; None for one worker.

    Threads that share each operation wait for the slowest after each, which beside other work is most of the time.
    """
    each = max(torch.get_num_threads() // workers, 1)

    def begin() -> None:  # both hold for a thread
        torch.set_num_threads(each)
        torch.set_flush_denormal(True)

    if workers == 1:
        yield None
        return
    with ThreadPoolExecutor(workers, "worker", begin) as threads:
        yield threads


def accumulate(
    model: Transformer,
    batch: Batch,
    loss_sum: LossSum,
    weight: float,
    train: Train,
    micro_batch: int,
    step: int,
    threads: Executor | None = None,
    compiles: bool = False,
    scale: float = 1.0,
) -> float:
    """Leaves the gradient of `scale * loss / weight`, summed over all processes, in `.grad`; returns `loss / weight`.

    `batch` is this process's share of the step's rows; `weight` is of all of them. `threads` are as many as
    `train.workers` says (see `side_by_side`); they must not draw random numbers, whose generator they share.
    """
    device, share = next(model.parameters()).device, weight / scale
    losses: list[Tensor] = []

    usual = {
        micro_batch,
        batch.share % micro_batch,
    }  # rows that each step has; what an epoch ends with is not compiled for

    def forward(rows: Batch) -> Tensor:
        model.compiles = compiles and len(rows.tokens) in usual
        part = loss_sum(model, rows.to(device))
        failpoint("step.loss", part)
        ranks.beat()
        return part

    def backward(rows: Batch) -> None:
        # Random draws are a function of the step and the rows, wherever they are computed.
        seed_everything(train.seed, step, rows.first)
        part = forward(rows)
        (part / share).backward()
        losses.append(part.detach())

    def apart(rows: Batch) -> tuple[Tensor, Sequence[Tensor]]:
        """The loss of a micro-batch and its gradient, kept apart from `.grad`."""
        part = forward(rows)
        return part.detach(), torch.autograd.grad(part / share, parameters)

    parameters = [p for p in model.parameters() if p.requires_grad]
    if train.reduce == "canonical":
        assert batch.share, "the loader says how many rows a whole share has"
        gradients = _tree(parameters, batch, backward, 0, -(-batch.share // micro_batch), micro_batch)
        ranks.add_pairwise(gradients)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        sums = [float(loss) for loss in losses]
        return math.fsum(value for part in ranks.gather(sums) for value in part) / weight
    micro_batches = list(batch.rows(micro_batch))
    if threads is None:
        for rows in micro_batches:
            backward(rows)
    else:
        workers = train.workers or 1
        for begin in range(0, len(micro_batches), workers):  # rounds: behind a slow thread gradients would pile up
            for part, found in threads.map(apart, micro_batches[begin : begin + workers]):
                losses.append(part)
                for parameter, gradient in zip(parameters, found, strict=True):
                    parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
                del found, gradient  # or they would be there through the next round
    total = float(torch.stack(losses).cpu().double().sum()) if losses else 0.0
    if ranks.started:
        for parameter in parameters:
            if parameter.grad is None:  # no rows for this process
                parameter.grad = torch.zeros_like(parameter)
        ranks.add([p.grad for p in parameters if p.grad is not None])
    return ranks.total(total)[0] / weight


def _tree(
    parameters: list[torch.nn.Parameter],
    batch: Batch,
    backward: Callable[[Batch], None],
    low: int,
    high: int,
    micro_batch: int,
) -> list[Tensor]:
    """The gradient of micro-batches low .. high-1 as one tree of sums; a place without rows adds zero."""
    if high - low == 1:
        rows = batch.cut(low * micro_batch, (low + 1) * micro_batch)
        if len(rows.tokens):
            backward(rows)
        found = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        for parameter in parameters:
            parameter.grad = None
        return found
    middle = (low + high) // 2
    left = _tree(parameters, batch, backward, low, middle, micro_batch)
    right = _tree(parameters, batch, backward, middle, high, micro_batch)
    torch._foreach_add_(left, right)
    return left
