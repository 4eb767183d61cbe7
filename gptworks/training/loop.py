"""The one loop. An objective says what a batch costs; hooks watch, evaluate, save and may end the run."""

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from gptworks.core.config import Train
from gptworks.core.errors import DataError, NotFinite, OutOfMemory, UsageError
from gptworks.core.failpoint import failpoint
from gptworks.core.ranks import ranks
from gptworks.core.registry import class_of
from gptworks.core.workers import Workers, side_by_side
from gptworks.data.batch import Batch, Batches, Cursor
from gptworks.training.gradients import StepLoss, accumulate
from gptworks.training.objectives import Objective
from gptworks.training.optim import Optimizer, add_penalties, set_rates
from gptworks.training.problem import checked
from gptworks.training.schedule import RunSchedule
from gptworks.training.state import WINDOW, State, spike_limit


@dataclass(frozen=True)
class Layout:
    """The layout of a step on this machine; decided once and stored with the run."""

    device: torch.device
    dtype: torch.dtype  # of the forward and backward pass; weights are float32
    micro_batch: int  # rows per forward pass
    compile: bool = False


@dataclass(frozen=True)
class StepMetrics:
    """The measurements of one step."""

    loss: float  # nats a token, before the update
    figures: dict[str, tuple[float, float]]  # of the objective: sum and weight
    grad_norm: float  # before clipping
    lr: float
    weight: float  # that the loss was divided by
    tokens: int  # targets trained on
    skipped: bool  # whether the update was left out, as a spike or for a gradient beyond fp16's range
    seconds: float  # the whole step
    data_seconds: float  # of those, waiting for the batch


SCALE_STEPS = 2000  # without an overflow, before the scale of the loss is doubled

Hook = Callable[[State, StepMetrics], str | None]  # a returned text ends the run and says why


def run(
    state: State,
    batches: Batches,
    objective: Objective,
    *,
    train: Train,
    layout: Layout,
    schedule: RunSchedule,
    hooks: Sequence[Hook] = (),
    until: int | None = None,
) -> State:
    """Trains from wherever `state` stands to step `until` (default: the end of the schedule).

    The loss of a step is `sum(loss) / global weight`, so micro-batches, packing, padding and the number of processes do
    not change it. Raises NotFinite before a bad update, DataError for a batch without targets, OutOfMemory, PeerLost.
    """
    model = state.model.to(layout.device).train()
    model.dtype = layout.dtype
    scaled, longest = layout.dtype == torch.float16, model.config.max_position_embeddings
    if layout.compile:
        torch.compiler.reset()  # it compiles a function for eight shapes, and those of earlier runs would count
    upcoming: Future[tuple[Batch, Cursor]] | None = None  # the next batch, made while the step computes
    with side_by_side(train.workers or 1) as workers, ThreadPoolExecutor(1, "loader") as aside:
        while state.step < (until or schedule.length) and not state.stopped:
            start = time.perf_counter()
            taken = upcoming.result() if upcoming else batches.take(state.cursor)
            batch, cursor = checked(taken, tuple, f"{class_of(batches)}.take")
            more = batches.ahead and state.step + 1 < (until or schedule.length)
            upcoming = aside.submit(batches.take, cursor) if more else None
            data_seconds = time.perf_counter() - start
            if (width := batch.tokens.shape[1]) > longest:
                raise UsageError(
                    f"{class_of(batches)}.take gives rows of {width} tokens, and the model takes {longest}: choose "
                    f"train.context={width}"
                )
            weight, tokens = ranks.total(objective.weight(batch), batch.tokens_seen)
            if weight == 0:
                raise DataError(f"step {state.step}: no trainable token in the batch; check the data and train.context")
            if not 0 < weight < math.inf:
                raise UsageError(f"{class_of(objective)}.weight gives {weight}: it has to be finite and above 0")
            try:
                loss = accumulate(
                    model, batch, objective, weight=weight, train=train, micro_batch=layout.micro_batch,
                    step=state.step, workers=workers, compiles=layout.compile, scale=state.scale if scaled else 1.0,
                )  # fmt: skip
                if scaled:
                    _unscale(state)
                norm = _clipped(state, loss, train=train, workers=workers, may_overflow=scaled and state.scale > 1)
                limit = spike_limit(state.norms, train.skip_spikes) if train.skip_spikes is not None else math.inf
                skipped = norm > limit or math.isinf(norm)
                lr = set_rates(state.optimizers, schedule.factor(state.step), schedule.peaks(state.step))
                state.settle()
                failpoint("step.update")
                if not skipped:
                    _update(state, train, workers)
                if scaled:
                    _rescale(state, beyond=math.isinf(norm))
            except (torch.OutOfMemoryError, RuntimeError) as error:
                raise _explained(error, layout.micro_batch) from error
            failpoint("step.count")
            model.zero_grad(set_to_none=True)
            if train.skip_spikes is not None and not math.isinf(norm):
                state.norms = [*state.norms, min(norm, limit)][-WINDOW:]  # or a spike would hide the next ones
            state.skipped += skipped
            state.step += 1
            state.tokens += round(tokens)
            state.cursor = cursor
            seconds = time.perf_counter() - start
            state.seconds += seconds
            metrics = StepMetrics(
                loss=loss.mean, figures=loss.figures, grad_norm=norm, lr=lr, weight=weight, tokens=round(tokens),
                skipped=skipped, seconds=seconds, data_seconds=data_seconds,
            )  # fmt: skip
            failpoint("step.hooks")
            for hook in hooks:
                state.stopped = hook(state, metrics) or state.stopped
            ranks.beat()
    return state


def _unscale(state: State) -> None:
    """Divides the gradients by the scale of the loss, once all are added up."""
    torch._foreach_mul_([p.grad for p in state.model.parameters() if p.grad is not None], 1 / state.scale)


def _rescale(state: State, beyond: bool) -> None:
    """Half the scale after a gradient beyond fp16's range, double after many steps without (Micikevicius et al. 2018,
    section 3.2; the numbers are those of torch.amp.GradScaler)."""
    state.steps_since_scaled += 1
    if beyond or state.steps_since_scaled == SCALE_STEPS:
        state.scale *= 0.5 if beyond else 2.0
        state.steps_since_scaled = 0


def _clipped(state: State, loss: StepLoss, *, train: Train, workers: Workers, may_overflow: bool = False) -> float:
    """Adds the penalties and clips; gives the gradient's norm before that, infinite where it is not finite and may be
    so. Raises NotFinite, for a figure of the objective too, and DataError where nothing has a gradient."""
    add_penalties(state.model, train.l1, train.l2)
    gradients = [p.grad for p in state.model.parameters() if p.grad is not None]
    if not gradients:
        raise DataError(f"step {state.step}: the loss depends on no parameter that is trained; look at the objective")
    failpoint("step.gradient", gradients[0])
    each = [norm for part in workers.share(torch._foreach_norm, gradients) for norm in part]
    whole = torch.linalg.vector_norm(torch.stack(each))
    if train.clip:
        factor = (train.clip / (whole + 1e-6)).clamp(max=1.0)
        workers.share(lambda part: torch._foreach_mul_(part, factor), gradients)
    norm = float(whole)
    if math.isfinite(loss.mean) and may_overflow and not math.isfinite(norm):
        return math.inf
    figures = [(f"figure {name!r}", value) for name, pair in loss.figures.items() for value in pair]
    for name, value in [("loss", loss.mean), ("gradient norm", norm), *figures]:
        if not math.isfinite(value):
            raise NotFinite(
                f"step {state.step}: the {name} is {value}; nothing was updated. Lower train.lr (now {train.lr}), "
                "or look at the batch; the last checkpoint, if there is one, is good"
            )
    return norm


@torch.no_grad()
def _update(state: State, train: Train, workers: Workers) -> None:
    for optimizer in state.optimizers:
        optimizer.step(workers) if isinstance(optimizer, Optimizer) else optimizer.step()  # torch's knows no workers
    parameters = state.trained()
    failpoint("step.weight", next(iter(parameters.values())))
    if train.ema:
        if not state.average:
            state.average = {name: p.detach().clone() for name, p in parameters.items()}
        # A short memory at first, so that the initial weights are soon forgotten.
        keep = min(train.ema, (1 + state.step) / (10 + state.step))
        averages, weights = list(state.average.values()), [parameters[name] for name in state.average]
        workers.share(lambda means, values: torch._foreach_lerp_(means, values, 1 - keep), averages, weights)


def _explained(error: Exception, micro_batch: int) -> Exception:
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text or "not enough memory" in text:
        fits = f"train.micro_batch={micro_batch // 2}" if micro_batch > 1 else "a smaller train.context or model"
        return OutOfMemory(f"out of memory in a step with {micro_batch} rows; try {fits}")
    return error
