"""The one loop. An objective says what a batch costs; hooks watch, evaluate, save and may end the run."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from gptworks.core.config import Train
from gptworks.core.errors import DataError, NotFinite, OutOfMemory
from gptworks.core.runtime import seed_everything
from gptworks.data.loader import Batch, Loader
from gptworks.train.objectives import Objective
from gptworks.train.optim import add_penalties, rate_factor, set_rates
from gptworks.train.state import State


@dataclass(frozen=True)
class Layout:
    """How a step is carried out on this machine; decided once and stored with the run."""

    device: torch.device
    dtype: torch.dtype  # of the forward and backward pass; weights are float32
    micro_batch: int  # rows per forward pass
    compile: bool = False


@dataclass(frozen=True)
class StepMetrics:
    """What one step measured."""

    loss: float  # nats a token, before the update
    grad_norm: float  # before clipping
    lr: float
    weight: float  # targets trained on
    seconds: float  # the whole step
    data_seconds: float  # of those, waiting for the batch


Hook = Callable[[State, StepMetrics], str | None]  # a returned text ends the run and says why


def run(
    state: State,
    loader: Loader,
    objective: Objective,
    train: Train,
    layout: Layout,
    total: int,
    hooks: Sequence[Hook] = (),
    until: int | None = None,
) -> State:
    """Trains from wherever `state` stands to step `until` (default: `total`, the length that schedules count in).

    The loss of a step is `sum(loss) / global weight`, so micro-batches, packing and padding do not change it. Raises
    NotFinite before a bad update, DataError for a batch without targets, OutOfMemory.
    """
    model = state.model.to(layout.device).train()
    model.dtype = layout.dtype
    loss_sum = torch.compile(objective.loss_sum, dynamic=False) if layout.compile else objective.loss_sum
    while state.step < (until or state.length(total)) and not state.stopped:
        start = time.perf_counter()
        batch, cursor = loader.take(state.cursor)
        data_seconds = time.perf_counter() - start
        weight = objective.weight(batch)
        if weight == 0:
            raise DataError(f"step {state.step}: no trainable token in the batch; check the data and train.context")
        try:
            loss, norm = _gradients(state, batch, loss_sum, weight, train, layout)
            lr = set_rates(state.optimizers, rate_factor(state.step, state.length(total), train))
            for optimizer in state.optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            raise _explained(error, layout.micro_batch) from error
        state.step += 1
        state.tokens += round(weight)
        state.cursor = cursor
        seconds = time.perf_counter() - start
        state.seconds += seconds
        metrics = StepMetrics(loss, norm, lr, weight, seconds, data_seconds)
        for hook in hooks:
            state.stopped = hook(state, metrics) or state.stopped
    return state


def _gradients(
    state: State,
    batch: Batch,
    loss_sum: Callable[..., torch.Tensor],
    weight: float,
    train: Train,
    layout: Layout,
) -> tuple[float, float]:
    """Leaves the clipped gradient of the mean loss in `.grad`; returns the loss and the gradient's norm."""
    total = torch.zeros((), dtype=torch.float64, device=layout.device)
    for number, rows in enumerate(batch.rows(layout.micro_batch)):
        seed_everything(train.seed, state.step, number)
        part = loss_sum(state.model, rows.to(layout.device))
        (part / weight).backward()
        total += part.detach()
    add_penalties(state.model, train.l1, train.l2)
    parameters = [p for p in state.model.parameters() if p.grad is not None]
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, train.clip or float("inf")))
    loss = float(total) / weight
    for name, value in (("loss", loss), ("gradient norm", norm)):
        if not -float("inf") < value < float("inf"):
            raise NotFinite(
                f"step {state.step}: the {name} is {value}; nothing was updated. Lower train.lr (now {train.lr}), "
                "or look at the batch; the last checkpoint is good"
            )
    return loss, norm


def _explained(error: Exception, micro_batch: int) -> Exception:
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text or "not enough memory" in text:
        fits = f"train.micro_batch={micro_batch // 2}" if micro_batch > 1 else "a smaller train.context or model"
        return OutOfMemory(f"out of memory in a step with {micro_batch} rows; try {fits}")
    return error
