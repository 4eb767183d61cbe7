"""The gradient of a step out of micro-batches, threads and processes.

`sum` adds up micro-batch by micro-batch. `canonical` adds in one fixed tree over the micro-batches of the whole
step, halves and halves of halves, of which each process computes a subtree: 1, 2 or 4 processes then agree in every
bit, at the price of one more copy of the gradient for each level of the tree. Either way a parameter that nothing in
the whole step depends on is left without a gradient, and no update moves it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gptworks.core.config import Train
from gptworks.core.errors import UsageError
from gptworks.core.failpoint import failpoint
from gptworks.core.ranks import ranks
from gptworks.core.registry import class_of
from gptworks.core.runtime import seed_everything
from gptworks.core.workers import ONE, Workers
from gptworks.data.batch import Batch
from gptworks.model.transformer import Transformer
from gptworks.training.objectives import Loss, Objective
from gptworks.training.problem import checked

Gradient = list[Tensor | None]  # one for each trained parameter; None where nothing depended on it


@dataclass(frozen=True)
class StepLoss:
    """The mean loss of a step, and its figures as (sum, weight), over all processes."""

    mean: float
    figures: dict[str, tuple[float, float]] = field(default_factory=dict)


def accumulate(
    model: Transformer,
    batch: Batch,
    objective: Objective,
    *,
    weight: float,
    train: Train,
    micro_batch: int,
    step: int,
    workers: Workers = ONE,
    compiles: bool = False,
    scale: float = 1.0,
) -> StepLoss:
    """Leaves the gradient of `scale * loss / weight`, summed over all processes, in `.grad`; returns `loss / weight`.

    `batch` is this process's share of the step's rows; `weight` is of all of them. `workers` must not
    draw random numbers, whose generator they share. Raises UsageError where rows that belong together would be divided.
    """
    if micro_batch % batch.unit or batch.share % batch.unit or len(batch.tokens) % batch.unit:
        raise UsageError(
            f"train.micro_batch={micro_batch} and {batch.share or len(batch.tokens)} rows a process would divide rows "
            f"that belong together, {batch.unit} at a time: choose multiples of {batch.unit}"
        )
    passes = _Passes(
        model,
        objective,
        micro_batch=micro_batch,
        share=batch.share,
        seed=train.seed,
        step=step,
        divisor=weight / scale,
        compiles=compiles,
    )
    if train.reduce == "canonical":
        if not batch.share:
            raise UsageError(
                "train.reduce=canonical needs to know how many rows each process has in a whole step: batches are made "
                "by Batch.share_of"
            )
        gradient = _tree(passes, batch, low=0, high=-(-batch.share // micro_batch))
        everyone = ranks.gather(([g is not None for g in gradient], passes.terms()))
        used = [any(column) for column in zip(*(mine for mine, _ in everyone), strict=True)]
        passes.keep(gradient, used)
        ranks.add_pairwise([p.grad for p in passes.parameters if p.grad is not None])
        rows = [row for _, terms in everyone for row in terms]
        sums = [math.fsum(column) for column in zip(*rows, strict=True)]
    else:
        if workers.count == 1:
            for rows_of_one in batch.rows(micro_batch):
                passes.backward(rows_of_one)
        else:
            _side_by_side(passes, list(batch.rows(micro_batch)), workers)
        sums = passes.sums()
        if ranks.started:
            here = [float(p.grad is not None) for p in passes.parameters]
            totals = ranks.total(*sums, *here)
            sums, counts = totals[: len(sums)], totals[len(sums) :]
            passes.keep([p.grad for p in passes.parameters], [count > 0 for count in counts])
            ranks.add([p.grad for p in passes.parameters if p.grad is not None])
    pairs = zip(sums[1::2], sums[2::2], strict=True)
    return StepLoss(sums[0] / weight, dict(zip(objective.figures, pairs, strict=True)))


class _Passes:
    """Forward and backward passes over the micro-batches of one step, and the losses that they had."""

    def __init__(
        self, model: Transformer, objective: Objective, micro_batch: int, share: int, seed: int, step: int,
        divisor: float, compiles: bool,
    ) -> None:  # fmt: skip
        self.model, self.objective, self.seed, self.step, self.divisor = model, objective, seed, step, divisor
        self.micro_batch, self.compiles = micro_batch, compiles
        self.usual = {micro_batch, share % micro_batch}  # rows that each step has; others are not compiled for
        self.device = next(model.parameters()).device
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.losses: list[Loss] = []

    def forward(self, rows: Batch) -> Loss:
        self.model.compiles = self.compiles and len(rows.tokens) in self.usual
        who = f"{class_of(self.objective)}.loss"
        loss = checked(self.objective.loss(self.model, rows.to(self.device)), Loss, who)
        failpoint("step.loss", loss.sum)
        if tuple(loss.figures) != self.objective.figures:
            raise UsageError(
                f"{class_of(self.objective)} names the figures {self.objective.figures} and its loss has "
                f"{tuple(loss.figures)}: they have to be the same"
            )
        ranks.beat()
        return loss

    def backward(self, rows: Batch) -> None:
        """Computes the gradient of a micro-batch and adds it to `.grad`."""
        # Random draws are a function of the step and the rows, wherever they are computed.
        seed_everything(self.seed, self.step, rows.first)
        loss = self.forward(rows)
        (loss.sum / self.divisor).backward()
        self.losses.append(_detached(loss))

    def apart(self, rows: Batch) -> tuple[Loss, Sequence[Tensor | None]]:
        """The loss of a micro-batch and its gradient, kept apart from `.grad`."""
        loss = self.forward(rows)
        gradient = torch.autograd.grad(loss.sum / self.divisor, self.parameters, allow_unused=True)
        return _detached(loss), gradient

    def keep(self, gradient: Gradient, used: list[bool]) -> None:
        """Makes a gradient that of the parameters; zero where it has none and another process has."""
        for parameter, value, somewhere in zip(self.parameters, gradient, used, strict=True):
            parameter.grad = torch.zeros_like(parameter) if somewhere and value is None else value

    def terms(self) -> list[list[float]]:
        """The terms of each micro-batch: the loss, then sum and weight of each figure."""
        return [[float(value) for value in self._values(loss)] for loss in self.losses]

    def sums(self) -> list[float]:
        """The figures added up over the micro-batches, in float64."""
        width = 1 + 2 * len(self.objective.figures)
        if not self.losses:
            return [0.0] * width
        columns = zip(*(self._values(loss) for loss in self.losses), strict=True)
        return [float(_stacked(column).cpu().double().sum()) for column in columns]

    def _values(self, loss: Loss) -> list[Tensor | float]:
        return [loss.sum, *(part for name in self.objective.figures for part in loss.figures[name])]


def _detached(loss: Loss) -> Loss:
    """The loss without its graph, which holds the activations."""
    figures = {name: (_plain(total), _plain(weight)) for name, (total, weight) in loss.figures.items()}
    return Loss(loss.sum.detach(), figures)


def _plain(value: Tensor | float) -> Tensor | float:
    return value.detach() if isinstance(value, Tensor) else value


def _stacked(values: Sequence[Tensor | float]) -> Tensor:
    return torch.stack([v if isinstance(v, Tensor) else torch.tensor(v, dtype=torch.float64) for v in values])


def _side_by_side(passes: _Passes, micro_batches: list[Batch], workers: Workers) -> None:
    """Workers compute the gradients; they are added to `.grad` in the order of the micro-batches."""
    for begin in range(0, len(micro_batches), workers.count):  # rounds: behind a slow thread gradients would pile up
        for loss, gradient in workers.map(passes.apart, micro_batches[begin : begin + workers.count]):
            passes.losses.append(loss)
            sums: list[Tensor] = []
            terms: list[Tensor] = []
            for parameter, value in zip(passes.parameters, gradient, strict=True):
                if value is not None and parameter.grad is not None:
                    sums.append(parameter.grad)
                    terms.append(value)
                elif value is not None:
                    parameter.grad = value
            if sums:
                workers.share(torch._foreach_add_, sums, terms)
            del gradient, value, terms  # or they would be there through the next round


def _tree(passes: _Passes, batch: Batch, low: int, high: int) -> Gradient:
    """The gradient of micro-batches low .. high-1 as one tree of sums; a place without rows adds nothing."""
    if high - low == 1:
        rows = batch.cut(low * passes.micro_batch, (low + 1) * passes.micro_batch)
        if len(rows.tokens):
            passes.backward(rows)
        gradient: Gradient = [p.grad for p in passes.parameters]
        for parameter in passes.parameters:
            parameter.grad = None
        return gradient
    middle = (low + high) // 2
    left, right = _tree(passes, batch, low=low, high=middle), _tree(passes, batch, low=middle, high=high)
    return [_added(a, b) for a, b in zip(left, right, strict=True)]


def _added(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """a + b. Where one is missing zero stands for it, since -0 + 0 is 0, and processes have to agree in every bit."""
    if a is None or b is None:
        there = a if b is None else b
        return None if there is None else there.add_(0.0)
    return a.add_(b)
