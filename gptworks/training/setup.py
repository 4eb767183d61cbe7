"""Everything decided before step one: model, optimizers, loader, precision, threads, micro-batch, length of the run.

What depends on the clock or the machine is decided here, becomes numbers in the run's config.yaml with their reasons,
and is read back when the run continues. One decision may follow later: `hooks.TimeBudget` plans a time
budget anew from the run's own pace, and writes that there too (`train.changes`).
"""

import fnmatch
import math
import os
import shutil
import statistics
import time
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from itertools import islice

import torch

from gptworks.core import ranks as processes
from gptworks.core import runtime
from gptworks.core.config import Adapter, Change, Config, get, with_values
from gptworks.core.errors import OutOfMemory, RunMismatch, UsageError
from gptworks.core.log import console, duration
from gptworks.core.ranks import ranks
from gptworks.core.registry import resolve
from gptworks.data.loader import Loader
from gptworks.data.shards import Shards, check_ids
from gptworks.infer.scoring import stream_losses
from gptworks.model import adapters, build
from gptworks.model.build import Loaded
from gptworks.model.config import ModelConfig, parameter_count
from gptworks.model.lowbit import scheme
from gptworks.model.transformer import Transformer
from gptworks.planning.cost import Memory, Trainable, flops_per_token, step_memory
from gptworks.planning.dial import Derived, derive_shape, derive_training
from gptworks.training.hooks import check_wandb
from gptworks.training.loop import Layout, StepMetrics, run
from gptworks.training.objectives import NextToken
from gptworks.training.optim import OPTIMIZERS, make_optimizers
from gptworks.training.schedule import SCHEDULES, RunSchedule, flat_share
from gptworks.training.state import State

USUAL_UTILISATION = 0.4  # of the matmul rate, what a step reaches; for forecasts only
# A cold compilation, of one block and the loss, and what of a step's time it saves: on a CPU beside the hand-written
# kernels (docs/log.md), on an H100 for GPT-2 124M (docs/benchmarks.md).
COMPILE_SECONDS = {"cpu": 30.0, "cuda": 15.0}
COMPILE_GAIN = {"cpu": 0.08, "cuda": 0.35}
# A pass through a block, both ways, with its share of the update, where a GPU waits for its host to start the kernels.
BLOCK_SECONDS = {"cuda": 4.3e-3}
CHECKPOINT_SECONDS = 15  # between two checkpoints, or a short run would mostly write them
WORKER_TOKENS = 256  # of a step, for a thread of its own; fewer, and its products are too small
# Of a forward pass: for each thread of a CPU; for a GPU. More gain nothing and take memory (docs/log.md).
PASS_TOKENS = {"cpu": 1024, "cuda": 2**16}
CALIBRATION_SECONDS = 6.0  # of steps, before a plan that stays
FIRST_SECONDS = 1.0  # before one that the run's own pace replaces
EVALUATED_ROWS = 64  # of the validation text, to time an evaluation
EVALUATION_SHARE = 0.08  # of a time budget, for evaluations; one there is always
MARGIN = 0.95  # of what is left of a time budget is planned for


@dataclass
class Run:
    """A run that is ready to start."""

    config: Config  # every value set
    reasons: dict[str, str]
    shards: Shards
    base: Loaded | None
    state: State
    loader: Loader
    layout: Layout
    eval_rows: int
    stop_ids: tuple[int, ...]
    most_steps: int | None  # what limits other than the clock allow; None where the length is an earlier process's
    eval_seconds: float  # of an evaluation, where a time budget was planned
    trainable: Trainable | None  # that is trained, where it is not all


def check(config: Config) -> None:
    """Raises UsageError for what is wrong whatever the text is, before anything is read or written."""
    if "???" in (config.data.train if isinstance(config.data.train, list) else [config.data.train]):
        raise UsageError("this recipe trains on a text of yours: add data.train=FILE (a file, folder or glob)")
    if config.model.path == "???":
        raise UsageError("this recipe starts from a model of yours: add model=FOLDER")
    check_values(config)


def check_values(config: Config) -> None:
    """The part of `check` that holds before a recipe's own text and model are named. Raises UsageError."""
    if config.adapter.base not in (None, "fp32", "bf16"):
        scheme(config.adapter.base)
    resolve("optimizer", OPTIMIZERS, config.train.optimizer)
    resolve("schedule", SCHEDULES, config.train.schedule)
    check_wandb(config.train.wandb)
    processes.check(config.train.reduce)
    if config.train.reduce == "canonical" and config.train.batch_tokens == "full":
        raise UsageError("train.reduce=canonical needs steps of one size; train.batch_tokens=full has them by epoch")
    if config.model.path is None:
        derive_shape(config, config.tokenizer.vocab_size)
    if isinstance(config.train.batch_tokens, int) and config.train.context:
        batch_rows(config)


def decide(config: Config, shards: Shards, base: Loaded | None, resolved: bool = False) -> Run:
    """Derives what is open in `config`, builds the model and the rest. A `resolved` one stays as it is."""
    tokenizer = shards.tokenizer
    if base is not None:
        architecture, reasons = base.model.config, {}
        context = config.train.context or architecture.max_position_embeddings
        if config.train.context is None:
            config = with_values(config, {"train.context": context})
            reasons["train.context"] = "the model's"
        if context > architecture.max_position_embeddings:
            raise UsageError(
                f"train.context={context}: {base.name} has positions for {architecture.max_position_embeddings}"
            )
    else:
        config, reasons, architecture = derive_shape(config, len(tokenizer))
    for split in (shards.train, shards.eval):
        check_ids(split, architecture.vocab_size, str(shards.path))

    for prompt in config.generate.prompts:
        # A prompt that cannot be continued is an error now, not after the training.
        size, limit = len(tokenizer.front + tokenizer.encode(prompt)), architecture.max_position_embeddings
        if size >= limit:
            raise UsageError(
                f"generate.prompts: {prompt[:40]!r} has {size:,} tokens; the model takes fewer than {limit:,}"
            )

    config, device, dtype, more = _machine(config)
    reasons |= more
    usual = USUAL_UTILISATION * runtime.matmul_rate(device, dtype) * ranks.world
    config, more = derive_training(config, architecture, len(shards.train.tokens) - 1, usual)
    reasons |= more
    if base is not None and base.adapter and config.adapter.kind:
        config, more = _adopt_adapter(config, base)
        reasons |= more
    model = None if base is None else _trainable_copy(base, config)
    trainable = Trainable.of(model) if model is not None and (config.adapter.kind or config.train.freeze) else None
    config, layout, more = _layout(config, architecture, device, dtype, trainable, resolved)
    reasons |= more
    if model is None:
        model = build.fresh(architecture, config.train.seed)
        freeze(model, config.train.freeze)
    train = config.train
    assert train.context and train.micro_batch
    loader = Loader(
        shards.train,
        train.context,
        None if train.batch_tokens == "full" else batch_rows(config),
        train.seed,
        math.ceil(train.max_epochs) if train.max_epochs else None,
        config.data.mask_documents,
        config.data.weights,
        ranks.rank,
        ranks.world,
    )
    state = State(model.to(layout.device), [])
    if train.precision == "fp8":
        state.model.use_float8()
    state.optimizers = make_optimizers(state.model, train)
    eval_rows = max(1, min(64, 16384 // train.context))
    most_steps, eval_seconds = None, 0.0
    if not resolved:
        config, most_steps, eval_seconds, more = _length(config, state, loader, layout, shards, eval_rows)
        reasons |= more
    total = config.train.max_steps
    assert total
    config, layout, more = _intervals_and_compile(config, layout, architecture, total, trainable, eval_seconds)
    reasons |= more
    stop_ids = base.stop_ids if base else ((tokenizer.eos_id,) if tokenizer.eos_id is not None else ())
    return Run(
        config, reasons, shards, base, state, loader, layout, eval_rows, stop_ids, most_steps, eval_seconds, trainable
    )


def _trainable_copy(base: Loaded, config: Config) -> Transformer:
    """The model that a run begins with: a copy of the base's, of which adapters or all is trained."""
    adapter = config.adapter
    if adapter.kind is None:
        if base.adapter:
            raise UsageError(
                f"{base.name} is an adapter: train it further with adapter=lora, or `gptworks merge` it first"
            )
        model = adapters.copy_of(base.model.requires_grad_(True))
    elif base.adapter is None:
        model = adapters.attach(base.model, adapter, config.train.seed)
    else:
        model = adapters.resume(base.model)
    freeze(model, config.train.freeze)
    return model


def _adopt_adapter(config: Config, base: Loaded) -> tuple[Config, dict[str, str]]:
    """With the settings that an adapter was begun with. Raises UsageError for others."""
    assert base.adapter
    before = {key: value for key, value in base.adapter if key not in ("kind", "dropout", "target_modules", "base")}
    for key, value in before.items():
        asked = getattr(config.adapter, key)
        if asked not in (value, Adapter.model_fields[key].default):
            raise UsageError(f"adapter.{key}={asked}: {base.name} was begun with {value}")
    if config.adapter.target_modules:
        raise UsageError(f"adapter.target_modules cannot be chosen now: {base.name} has its layers")
    before["base"] = base.adapter.base or "fp32"
    names = {f"adapter.{key}": value for key, value in before.items()}
    return with_values(config, names), dict.fromkeys(names, "the adapter's")


def freeze(model: Transformer, patterns: list[str]) -> None:
    """Parameters whose names match keep their values. Raises UsageError for a pattern that matches nothing."""
    parameters = dict(model.named_parameters())
    for pattern in patterns:
        names = fnmatch.filter(parameters, pattern)
        if not names:
            raise UsageError(
                f"train.freeze has {pattern!r}, which no parameter matches; there is {next(iter(parameters))}"
            )
        for name in names:
            parameters[name].requires_grad_(False)
    if not any(p.requires_grad for p in parameters.values()):
        raise UsageError("train.freeze leaves nothing to train")


def change(run: Run, asked: Config, different: list[tuple[str, object, object]]) -> Change | None:
    """What a continued run does from its present step on, now that `flexible` keys `different` were asked for; None
    where that is nothing. Raises RunMismatch for what can no longer be had."""
    step, schedule, values, why = run.state.step, RunSchedule(run.config.train), {}, []
    for key, old, new in different:
        name = key.removeprefix("train.")
        if name in ("lr", "adam_lr"):
            if new is None:
                raise RunMismatch(f"{key}={old} cannot be left open now: the run has begun; give a value")
            values[name] = new
        elif name == "decay_now" and not new:
            continue
        why.append(f"{key}={new}" if old is None else f"{key}={new}, was {old}")
    limits = {key for key, _, new in different if key in LIMITS and new is not None}
    dropped = [(key, old) for key, old, new in different if key in LIMITS and new is None]
    if dropped and not limits:
        raise RunMismatch(f"{dropped[0][0]}={dropped[0][1]} cannot be left open now: the run has begun; give a value")
    if limits:
        open_limits = {key: None for key in LIMITS if key not in limits}
        config = with_values(run.config, {key: get(asked, key) for key in limits} | open_limits)
        steps, reason = min(_limits(config, run.loader))
        if steps <= step and not (steps == step == schedule.length):
            raise RunMismatch(
                f"{reason}: the run has already done {step} steps, which makes {run.state.tokens:,} tokens"
            )
        values["length"] = steps
    if asked.train.decay_now and any(key == "train.decay_now" for key, _, _ in different):
        if not 0 < step < schedule.length:
            raise RunMismatch(f"train.decay_now=true: the run stands at step {step} of {schedule.length}")
        return schedule.decay_from(step).model_copy(update=values | {"why": "; ".join(why)})
    if values and "length" not in values and step == schedule.length:
        raise RunMismatch(f"{why[0]}: the run is finished at step {step}; ask for more steps, tokens or epochs with it")
    return Change(step=step, why="; ".join(why), **values) if why else None


def batch_rows(config: Config) -> int:
    train = config.train
    assert isinstance(train.batch_tokens, int) and train.context
    if train.batch_tokens < train.context:
        raise UsageError(
            f"train.batch_tokens={train.batch_tokens} is less than one row of train.context={train.context}"
        )
    return train.batch_tokens // train.context


def _machine(config: Config) -> tuple[Config, torch.device, torch.dtype, dict[str, str]]:
    """Device, precision, threads and determinism."""
    derived, train = Derived(), config.train
    device = runtime.device()
    threads = train.threads
    if threads is None:
        threads, why = _usual_threads(), "this machine's cores"
        if ranks.world > 1:  # torchrun sets OMP_NUM_THREADS=1, which says nothing about the machine
            threads = max(runtime.cores() // ranks.per_machine, 1)
            why += f", shared by {ranks.per_machine} processes"
        derived.choose("train.threads", threads, f"{why}; part of a bitwise resume")
    torch.set_num_threads(threads)
    precision: str = train.precision
    if precision == "auto":
        fast = runtime.has_bf16(device)
        other = "fp16" if runtime.has_fp16(device) else "fp32"
        why = f"{device.type} {'multiplies bf16 in hardware' if fast else 'has no bf16 units'}; weights stay fp32"
        precision = derived.choose("train.precision", "bf16" if fast else other, why)
    elif precision == "bf16" and not runtime.has_bf16(device):
        console.warn(f"train.precision=bf16: this {device.type} has no bf16 units and will be slower than with fp32")
    elif precision == "fp16" and not runtime.has_fp16(device):
        raise UsageError(f"train.precision=fp16: this {device.type} has no units for it; use auto")
    elif precision == "fp8":
        if not runtime.has_float8(device):
            raise UsageError(f"train.precision=fp8: this {device.type} has no float8 units; use auto")
        assert train.context
        if config.adapter.kind:
            raise UsageError("train.precision=fp8 is for models trained whole; beside adapters take bf16 or auto")
        if train.context % 16:
            raise UsageError(f"train.precision=fp8 wants rows of a multiple of 16 tokens, not {train.context}")
    if train.deterministic == "auto":
        on = derived.choose("train.deterministic", device.type == "cpu", "free on a CPU, costs speed on a GPU")
    else:
        on = train.deterministic
    # use_deterministic_algorithms also imports the compiler, three seconds: called only where we compile.
    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or products there differ from run to run
    torch.set_deterministic_debug_mode("default" if not on else "error" if device.type == "cpu" else "warn")
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.set_flush_denormal(True)
    if device.type == "cpu":
        runtime.reuse_memory()
    dtype = {"fp32": torch.float32, "fp16": torch.float16}.get(precision, torch.bfloat16)
    if config.adapter.kind and config.adapter.base is None:
        base, why = ("bf16", "as the frozen layers multiply") if dtype == torch.bfloat16 else ("fp32", "as they are")
        derived.choose("adapter.base", base, why)
    return with_values(config, derived.values), device, dtype, derived.reasons


@cache
def _usual_threads() -> int:
    """torch's own choice, before a run of this process made another."""
    return torch.get_num_threads()


def _layout(
    config: Config,
    architecture: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    trainable: Trainable | None,
    resolved: bool,
) -> tuple[Config, Layout, dict[str, str]]:
    """Workers, and rows in a forward pass: as asked, or as many as memory holds. Raises OutOfMemory naming what would
    fit; a run that has begun cannot take fewer rows and is only warned."""
    derived, train, element = Derived(), config.train, dtype.itemsize
    assert train.context
    wanted = 10**9 if train.batch_tokens == "full" else -(-batch_rows(config) // ranks.world)
    free = int(runtime.available_memory(device) * 0.9) // (ranks.per_machine if device.type == "cpu" else 1)
    # The average; the best, which is kept in the processor's memory; the model that a time budget is planned with.
    copies = bool(train.ema) + (train.patience is not None and device.type == "cpu") + bool(train.time_budget_s)
    trained = trainable.trained if trainable else parameter_count(architecture)

    def memory(context: int) -> Memory:
        """Of a step that is not compiled, which takes more: `auto` decides later, and the end of an epoch never is."""
        masked = config.data.mask_documents
        found = step_memory(
            architecture, context, train.optimizer, element, device.type, masked, False, trainable, copies
        )
        if train.reduce == "canonical":  # a gradient for each level of the tree, and what is exchanged
            levels = math.ceil(math.log2(max(wanted, 2))) + 3 * (ranks.world > 1)
            found = replace(found, fixed=found.fixed + 4 * trained * levels)
        return found

    def rows_of_each(workers: int) -> int:
        return memory(context).rows(free - 4 * trained * (workers - 1)) // workers

    context = train.context
    workers, why = _workers(config, architecture, device, wanted)
    if train.workers is None:
        if rows_of_each(workers) < 1:
            workers, why = 1, "memory is too small for more"
        derived.choose("train.workers", workers, why)
    fits = rows_of_each(workers)

    def need(context: int, rows: int) -> float:
        return memory(context).of(rows) / 1e9

    if resolved:
        if fits < min(train.micro_batch or 1, wanted):
            rows = train.micro_batch or 1
            console.warn(f"a step needs about {need(train.context, rows):.1f} GB and {free / 1e9:.1f} GB are free")
    elif fits < 1:
        short = next((c for c in (2**e for e in range(20, 3, -1)) if c < context and need(c, 1) <= free / 1e9), None)
        advice = f"train.context={short} fits" if short else "choose a smaller model (model.parameters)"
        raise OutOfMemory(f"one row needs about {need(context, 1):.1f} GB and {free / 1e9:.1f} GB are free; {advice}")
    if train.micro_batch is not None:
        whole = train.micro_batch * ranks.world
        if train.reduce == "canonical" and batch_rows(config) % whole:
            raise UsageError(
                f"train.reduce=canonical shares out whole micro-batches: {batch_rows(config)} rows a step do not "
                f"divide into micro-batches of {train.micro_batch} on {ranks.world} process{'es' * (ranks.world > 1)}"
            )
        if min(train.micro_batch, wanted) > fits and not resolved:
            raise OutOfMemory(
                f"train.micro_batch={train.micro_batch} needs about {need(train.context, train.micro_batch):.1f} GB "
                f"and {free / 1e9:.1f} GB are free; train.micro_batch={fits} fits"
            )
        return with_values(config, derived.values), Layout(device, dtype, train.micro_batch), derived.reasons
    micro = max(1, min(fits, useful_rows(device, wanted, train.context, workers)))
    if train.reduce == "canonical":
        rows = batch_rows(config)
        shares = max(ranks.world, math.gcd(rows, 8))  # so that a run may move to as many as eight processes
        micro = max((m for m in range(1, micro + 1) if rows % (m * shares) == 0), default=0)
        if not micro:
            raise UsageError(
                f"train.reduce=canonical: the {rows} rows of a step (train.batch_tokens) do not divide among "
                f"{ranks.world} processes"
            )
    elif wanted > micro and train.batch_tokens != "full":  # as many for each worker, and if it can be all of one size
        fewest = -(-wanted // (workers * micro))
        even = (n for n in range(fewest, 2 * fewest) if wanted % (workers * n) == 0)
        micro = -(-wanted // (workers * next(even, fewest)))
    derived.choose("train.micro_batch", int(micro), f"{memory(context).row * micro / 1e6:.0f} MB of activations")
    return with_values(config, derived.values), Layout(device, dtype, int(micro)), derived.reasons


def useful_rows(device: torch.device, rows: int, context: int, workers: int) -> int:
    """Rows of a forward pass beyond which nothing is gained, when workers share the rows of a step."""
    tokens = PASS_TOKENS.get(device.type, PASS_TOKENS["cuda"])
    if device.type == "cpu":
        tokens *= max(torch.get_num_threads() // workers, 1)
    return min(-(-rows // workers), max(tokens // context, 1))


def _workers(config: Config, architecture: ModelConfig, device: torch.device, rows: int) -> tuple[int, str]:
    """Threads that compute micro-batches side by side (`gradients.side_by_side`), as asked or as many as there are.
    Raises UsageError for what keeps a step whole."""
    train = config.train
    assert train.threads and train.context
    dropped = architecture.embed_dropout or architecture.attention_dropout or architecture.residual_dropout
    dropped = dropped or config.adapter.dropout
    obstacles = {
        f"runs on {device.type}": device.type != "cpu",
        "draws dropout from one generator": bool(dropped),
        "adds up in one order (train.reduce=canonical)": train.reduce == "canonical",
        "is compiled": train.compile is True,
    }
    obstacle = next((name for name, holds in obstacles.items() if holds), None)
    if train.workers is not None:
        if train.workers > 1 and obstacle:
            raise UsageError(f"train.workers={train.workers}: a step that {obstacle} has one; leave the key out")
        if train.workers > train.threads:
            raise UsageError(f"train.workers={train.workers} are more than train.threads={train.threads}")
        return train.workers, ""
    if obstacle:
        return 1, f"a step that {obstacle} has one"
    batches = rows // train.micro_batch if train.micro_batch else rows * train.context // WORKER_TOKENS
    workers = max(min(train.threads, rows, batches), 1)
    return workers, f"{train.threads} threads, {rows * train.context} tokens a step"


def _length(
    config: Config, state: State, loader: Loader, layout: Layout, shards: Shards, eval_rows: int
) -> tuple[Config, int, float, dict[str, str]]:
    """Turns tokens, epochs and a time budget into `train.max_steps`, the smallest of all limits; also gives the
    smallest without the budget, and the seconds of an evaluation within one."""
    train, derived = config.train, Derived()
    limits = _limits(config, loader)
    most_steps = min(limits, default=(10**15, ""))[0]
    eval_seconds = 0.0
    if train.time_budget_s:
        fitting, eval_seconds = _steps_in_budget(config, state, loader, layout, shards, eval_rows)
        limits.append(fitting)
    steps, why = min(limits)
    if train.max_steps != steps:
        derived.choose("train.max_steps", steps, why)
    return with_values(config, derived.values), most_steps, eval_seconds, derived.reasons


LIMITS = ("train.max_steps", "train.max_tokens", "train.max_epochs")


def _limits(config: Config, loader: Loader) -> list[tuple[int, str]]:
    """The steps that each of the limits comes to, and which it is."""
    train = config.train
    assert train.context
    limits: list[tuple[int, str]] = []
    if train.max_steps:
        limits.append((train.max_steps, f"train.max_steps={train.max_steps}"))
    if train.max_tokens:
        steps = train.max_tokens // (batch_rows(config) * train.context)
        limits.append((max(1, steps), f"train.max_tokens={train.max_tokens}"))
    if train.max_epochs:
        if train.batch_tokens == "full":
            steps = math.ceil(train.max_epochs)
        else:
            steps = math.ceil(loader.rows_in(train.max_epochs) / batch_rows(config))
        limits.append((max(1, steps), f"train.max_epochs={train.max_epochs:g}"))
    return limits


def _steps_in_budget(
    config: Config, state: State, loader: Loader, layout: Layout, shards: Shards, eval_rows: int
) -> tuple[tuple[int, str], float]:
    """Times a few steps on a copy of the model, and a part of an evaluation, and fills what is left of the budget with
    them; gives also the seconds of an evaluation."""
    train = config.train
    assert train.time_budget_s and train.context
    console.live("timing a few steps")
    trial = State(adapters.copy_of(state.model), [])
    trial.optimizers = make_optimizers(trial.model, train)
    times: list[float] = []
    began = time.perf_counter()
    enough = FIRST_SECONDS if flat_share(train) else min(CALIBRATION_SECONDS, train.time_budget_s / 20)

    def timer(_: State, m: StepMetrics) -> str | None:
        runtime.interrupts.check()
        times.append(m.seconds)
        return "timed" if len(times) >= 2 and time.perf_counter() - began > enough else None

    endless = RunSchedule(train.model_copy(update={"max_steps": 10**9, "changes": []}))
    run(
        trial, loader, NextToken(train), train=train, layout=replace(layout, compile=False), schedule=endless,
        hooks=[timer],
    )  # fmt: skip
    step_seconds = statistics.median(times[1:])
    began = time.perf_counter()
    batches = stream_losses(trial.model, shards.eval, train.context, eval_rows)
    timed = sum(len(losses) for losses in islice(batches, math.ceil(EVALUATED_ROWS / eval_rows)))
    eval_seconds = (time.perf_counter() - began) / ranks.world * (len(shards.eval.tokens) - 1) / timed
    left = train.time_budget_s - runtime.process_seconds()
    evaluations = _evaluations(train.time_budget_s, eval_seconds) if train.eval_every is None else 1
    if train.eval_every:
        step_seconds += eval_seconds / train.eval_every
    steps = int((left - evaluations * eval_seconds - 1.0) * MARGIN / step_seconds)
    if steps < 1:
        raise UsageError(
            f"train.time_budget_s={train.time_budget_s:g}: {runtime.process_seconds():.0f} s went into preparation "
            f"and a step takes {duration(step_seconds)}; give more time or a smaller model"
        )
    why = f"{duration(left)} of {train.time_budget_s:g} s left, {1000 * step_seconds:.0f} ms a step"
    return (steps, why), eval_seconds


def _evaluations(budget: float, seconds: float) -> int:
    """How many evaluations of so many seconds each a time budget is given, the last included."""
    return max(1, min(5, int(EVALUATION_SHARE * budget / max(seconds, 1e-9))))


def _intervals_and_compile(
    config: Config,
    layout: Layout,
    architecture: ModelConfig,
    total: int,
    trainable: Trainable | None,
    eval_seconds: float,
) -> tuple[Config, Layout, dict[str, str]]:
    """How often to evaluate and save, and whether compiling pays, now that the length is known."""
    derived, train = Derived(), config.train
    assert train.context
    tokens = total * (batch_rows(config) * train.context if train.batch_tokens != "full" else 1)
    rate = USUAL_UTILISATION * runtime.matmul_rate(layout.device, layout.dtype) * ranks.world
    expected, kind = (
        tokens * flops_per_token(architecture, train.context, trainable) / rate,
        layout.device.type,
    )  # seconds
    if train.batch_tokens != "full":
        passes = total * math.ceil(batch_rows(config) / ranks.world / layout.micro_batch)
        expected = max(expected, passes * architecture.num_hidden_layers * BLOCK_SECONDS.get(kind, 0.0))
    if train.eval_every is None:
        times = _evaluations(train.time_budget_s, eval_seconds) if train.time_budget_s else 10
        derived.choose(
            "train.eval_every",
            max(1, math.ceil(total / times)),
            f"{times} evaluations" if times > 1 else "one evaluation, at the end",
        )
    if train.checkpoint_every is None:
        apart, why = total / 10, "ten checkpoints, two kept; at each a time budget is planned anew"
        if not train.time_budget_s and train.batch_tokens != "full":
            apart, why = max(apart, total * CHECKPOINT_SECONDS / expected), "at most ten, not too often; two are kept"
        derived.choose("train.checkpoint_every", min(math.ceil(apart), total), why)
    compile = train.compile
    if compile == "auto":
        takes, gain = COMPILE_SECONDS.get(kind, math.inf), COMPILE_GAIN.get(kind, 0.0)
        wanted = {
            "a step of one worker": train.workers == 1 and train.batch_tokens != "full",
            "experts only in bf16 on a GPU": not architecture.num_experts
            or (kind == "cuda" and layout.dtype == torch.bfloat16),  # elsewhere each batch has other sizes
        }
        lacking = next((what for what, there in wanted.items() if not there), None)
        pays = expected * gain > takes and not lacking and _can_compile(layout)
        cost = f"compiling takes {takes:.0f} s and saves some {gain:.0%}"
        why = f"for {lacking}" if lacking else f"about {duration(expected)} of training; {cost}"
        compile = derived.choose("train.compile", bool(pays), why)
    elif compile and not _can_compile(layout):
        needs = "Triton and a C compiler" if layout.device.type == "cuda" else "a C++ compiler (g++ or clang++)"
        raise UsageError(f"train.compile=true needs {needs} here; install what is missing or use auto")
    if compile and train.deterministic:
        torch.use_deterministic_algorithms(True, warn_only=layout.device.type != "cpu")
    return with_values(config, derived.values), replace(layout, compile=bool(compile)), derived.reasons


def _can_compile(layout: Layout) -> bool:
    """A C++ compiler makes a CPU's kernels; Triton makes a GPU's, and has a C compiler make what launches them."""
    if layout.device.type == "cuda":
        compilers = (os.environ.get("CC", ""), "cc", "gcc", "clang")
        return find_spec("triton") is not None and any(shutil.which(name) for name in compilers if name)
    return any(shutil.which(name) for name in ("g++", "clang++", "c++"))
