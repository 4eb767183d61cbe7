"""Everything decided before step one, as a function: what was asked, what is known, which machine -> choices.

Nothing of the process is touched and no torch is loaded, so the same question can be asked for another machine, or
again for a finished run. It is asked twice for a run: what depends on text and clock stays open the first time, and is
decided once rows were counted and steps were timed (`Facts.measured`). One decision may follow later: a time budget is
planned anew from the run's own pace (`training/hooks.py`).
"""

import math
from dataclasses import replace

from gptworks.core.config import Adapter, Config
from gptworks.core.errors import OutOfMemory, UsageError
from gptworks.core.log import duration, plural, size
from gptworks.model.config import ModelConfig, parameter_count
from gptworks.planning.budget import SLOWER, Pace, can_hold, planned_end, steps_until, with_evaluations
from gptworks.planning.choices import Choices, Facts, Measured, needed
from gptworks.planning.cost import Memory, Trainable, flops_per_token, step_memory
from gptworks.planning.dial import (
    USUAL_PARAMETERS,
    derive_shape,
    derive_training,
)
from gptworks.planning.machine import Machine, usual_precision
from gptworks.planning.size import BUDGET_TRAINED, limit_passes, say_time_left, suiting_size, weigh_the_wish

# FLOPs up to which a run is better off with rows of so many tokens (docs/log.md).
SHORT_RUN, SHORT_ROWS = 2e14, 128
# A cold compilation, of one block and the loss, and what of a step's time it saves: on a CPU beside the hand-written
# kernels (docs/log.md), on an H100 for GPT-2 124M (docs/benchmarks.md).
COMPILE_SECONDS = {"cpu": 30.0, "cuda": 15.0}
COMPILE_GAIN = {"cpu": 0.08, "cuda": 0.35}
# A pass through a block, both ways, with its share of the update, where a GPU waits for its host to start the kernels.
BLOCK_SECONDS = {"cuda": 4.3e-3}
CHECKPOINT_SECONDS = 15  # between two checkpoints, or a short run would mostly write them
MANY_THREADS = 4  # times those of a machine
WORKER_TOKENS = 256  # of a step, for a thread of its own; fewer, and its products are too small
# Of a forward pass: for each thread of a CPU; for a GPU. More gain nothing and take memory (docs/log.md).
PASS_TOKENS = {"cpu": 1024, "cuda": 2**16}
EVALUATION_SHARE = 0.08  # of a run, for evaluations that nobody asked for; one there is always
EVALUATION_COST = 1 / 3  # of a token that is trained on
# A curve wants so many points; a time budget may come to half the steps. Longer runs are logged every so many steps.
LOGGED_POINTS, LOG_APART = 100, 10
PADDING_COUNTED = 0.01  # of the places of a row; less is no part of a number of tokens
ELEMENT = {"fp32": 4}  # bytes of a value in the passes; 2 in any other precision

LIMITS = ("train.max_steps", "train.max_tokens", "train.max_epochs")


def choose(asked: Config, facts: Facts, machine: Machine) -> Choices:
    """All that a run needs to know, each value with its reason.

    Raises UsageError for what cannot be had, OutOfMemory where not even a row of a step fits. Where the vocabulary is
    not known, what follows from it stays open.
    """
    choices = Choices(asked)
    if asked.generate.prompts is None and facts.prompts:
        choices.set("generate.prompts", facts.prompts, "beginnings of held-out lines")
    elif asked.generate.prompts is None and facts.epoch_tokens is None and not facts.endless:
        choices.leave("generate.prompts", "beginnings of held-out lines, once the text is read")
    if asked.tokenizer.vocab_size is None and facts.vocabulary is not None:
        choices.set("tokenizer.vocab_size", facts.vocabulary, "suits a text of this size")
    _set_up_process(choices, machine)
    limit_passes(choices, facts)
    if asked.train.context is None and facts.base is None and asked.train.time_budget_s:
        flops = asked.train.time_budget_s * machine.flops_per_second(choices.config.train.precision, USUAL_PARAMETERS)
        if flops < SHORT_RUN and asked.problem.kind == "pretraining":
            choices.set("train.context", SHORT_ROWS, "a short run sees more text in shorter rows")
    sized = any(getattr(asked.model, name) for name in ("parameters", "depth", "hidden_size", "num_hidden_layers"))
    if facts.base is not None:
        _take_over(choices, facts)
    elif facts.vocab_size is None:
        choices.leave("model.num_hidden_layers", "the tokenizer's size is not known yet")
    elif not sized and facts.epoch_tokens is None and not facts.endless:
        choices.leave("model.parameters", "follows from the text and the time")
    else:
        wanted = None if sized else suiting_size(choices, facts, machine)
        choices.architecture = derive_shape(choices, facts.vocab_size, wanted)
    architecture = choices.architecture
    if architecture is None:
        return choices
    epoch_tokens = math.inf if facts.endless else facts.epoch_tokens
    fitting = _tokens_in_budget(choices, architecture, facts=facts, machine=machine)
    derive_training(choices, architecture, epoch_tokens=epoch_tokens, budget_tokens=fitting)
    if facts.base and facts.base.adapter and choices.config.adapter.kind:
        _adopt_adapter(choices, facts.base.adapter, facts.base.name)
    choices.trainable = trainable_part(choices.config, architecture, facts.bytes_per_weight)
    _share_out(choices, architecture, facts=facts, machine=machine)
    _limit(choices, facts, machine)
    if facts.base is None and facts.measured and choices.config.train.time_budget_s:
        if sized:
            tokens = needed(choices.config.train.max_steps) * step_tokens(choices.config, facts.epoch_tokens)
            weigh_the_wish(choices, architecture, facts=facts, machine=machine, tokens=tokens)
        say_time_left(choices, passes=fitting / needed(epoch_tokens))
    set_intervals(choices, architecture, facts=facts, machine=machine)
    return choices


def _tokens_in_budget(choices: Choices, architecture: ModelConfig, facts: Facts, machine: Machine) -> float:
    """The tokens that a time budget is likely to hold: by the steps that were timed, before that by the shape."""
    train, measured = choices.config.train, facts.measured
    if not train.time_budget_s:
        return math.inf
    if measured and measured.step_tokens:
        return max(BUDGET_TRAINED * measured.left_seconds / measured.step_seconds * measured.step_tokens, 1.0)
    flops = flops_per_token(architecture, needed(train.context), choices.trainable)
    rate = machine.flops_per_second(train.precision, parameter_count(architecture))
    return max(0.8 * train.time_budget_s * rate / flops, 1.0)


def _take_over(choices: Choices, facts: Facts) -> None:
    """The shape of the model that the run starts from."""
    base = needed(facts.base)
    context = choices.config.train.context or choices.set(
        "train.context", base.architecture.max_position_embeddings, "the model's"
    )
    if context > base.architecture.max_position_embeddings:
        raise UsageError(
            f"train.context={context}: {base.name} has positions for {base.architecture.max_position_embeddings}"
        )
    choices.architecture = base.architecture


def _adopt_adapter(choices: Choices, begun: Adapter, name: str) -> None:
    """The settings that an adapter was begun with. Raises UsageError for others."""
    asked = choices.config.adapter
    if asked.target_modules:
        raise UsageError(f"adapter.target_modules cannot be chosen now: {name} has its layers")
    for key, value in begun:
        if key in ("kind", "dropout", "target_modules", "base"):
            continue
        if getattr(asked, key) not in (value, Adapter.model_fields[key].default):
            raise UsageError(f"adapter.{key}={getattr(asked, key)}: {name} was begun with {value}")
        choices.set(f"adapter.{key}", value, "the adapter's")
    choices.set("adapter.base", begun.base or "fp32", "the adapter's")


def trainable_part(config: Config, architecture: ModelConfig, bytes_per_weight: float | None) -> Trainable | None:
    """The trained part of the model, where that is not all of it; bytes of a low-bit weight where there are some."""
    adapter = config.adapter if config.adapter.kind else None
    if adapter is None and not config.train.freeze:
        return None
    weight_bytes = {None: 4.0, "fp32": 4.0, "bf16": 2.0}.get(adapter.base if adapter else None) or needed(
        bytes_per_weight
    )
    return Trainable.of(architecture, adapter, freeze=config.train.freeze, bytes_per_weight=weight_bytes)


def _set_up_process(choices: Choices, machine: Machine) -> None:
    """Threads, precision and determinism."""
    train, device = choices.config.train, machine.device
    if train.threads is None:
        shared = f", shared by {machine.per_machine} processes" if machine.per_machine > 1 else ""
        choices.set("train.threads", machine.threads, f"this machine's cores{shared}; part of a bitwise resume")
    elif train.threads > MANY_THREADS * machine.threads:
        choices.warnings.append(
            f"train.threads={train.threads}: this machine computes with {machine.threads}; more make it slower"
        )
    precision: str = train.precision
    if precision == "auto":
        units = "multiplies bf16 in hardware" if machine.bf16 else "has no bf16 units"
        usual = usual_precision(machine.bf16, machine.fp16)
        precision = choices.set("train.precision", usual, f"{device} {units}; weights stay fp32")
    elif precision == "bf16" and not machine.bf16:
        choices.warnings.append(
            f"train.precision=bf16: this {device} has no bf16 units and will be slower than with fp32"
        )
    elif precision == "fp16" and not machine.fp16:
        raise UsageError(f"train.precision=fp16: this {device} has no units for it; use auto")
    elif precision == "fp8":
        if not machine.fp8:
            raise UsageError(f"train.precision=fp8: this {device} has no float8 units; use auto")
        if choices.config.adapter.kind:
            raise UsageError("train.precision=fp8 is for models trained whole; beside adapters take bf16 or auto")
        if (train.context or 16) % 16:
            raise UsageError(f"train.precision=fp8 wants rows of a multiple of 16 tokens, not {train.context}")
    if train.deterministic == "auto":
        choices.set("train.deterministic", device == "cpu", "free on a CPU, costs speed on a GPU")
    if choices.config.adapter.kind and choices.config.adapter.base is None:
        halves = precision in ("bf16", "fp8")
        base, why = ("bf16", "as the frozen layers multiply") if halves else ("fp32", "as they are")
        choices.set("adapter.base", base, why)


def memory_of_step(
    config: Config, architecture: ModelConfig, trainable: Trainable | None, facts: Facts, machine: Machine,
    context: int,
) -> Memory:  # fmt: skip
    """The memory of a step that is not compiled, which takes more: `auto` decides later, and the end of an epoch never
    is."""
    train = config.train
    # The average; the best, which is kept in the processor's memory; the model that a time budget is planned with.
    on_cpu = machine.device == "cpu"
    copies = bool(train.ema) + (train.patience is not None and on_cpu) + bool(train.time_budget_s)
    element = ELEMENT.get(train.precision, 2)
    memory = step_memory(
        architecture, context, optimizer=train.optimizer, element=element, device=machine.device,
        masked=config.data.mask_documents, compiled=False, trainable=trainable, copies=copies,
    )  # fmt: skip
    fixed = memory.fixed + facts.beside_bytes
    if train.reduce == "canonical":  # a gradient for each level of the tree, and what is exchanged
        trained = trainable.trained if trainable else parameter_count(architecture)
        rows = wanted_rows(config, machine)
        levels = math.ceil(math.log2(max(rows, 2))) + 3 * (machine.processes > 1)
        fixed += 4 * trained * levels
    return replace(memory, fixed=fixed)


def wanted_rows(config: Config, machine: Machine) -> int:
    """Rows of a step that each process computes; endlessly many where a step is the whole corpus."""
    return 10**9 if config.train.batch_tokens == "full" else -(-batch_rows(config) // machine.processes)


def _share_out(choices: Choices, architecture: ModelConfig, facts: Facts, machine: Machine) -> None:
    """Workers, and rows in a forward pass: as asked, or as many as memory holds. Raises OutOfMemory naming what would
    fit."""
    config, train = choices.config, choices.config.train
    if train.batch_tokens is None:
        for key in ("train.workers", "train.micro_batch"):
            if getattr(train, key.partition(".")[2]) is None:
                choices.leave(key, choices.open["train.batch_tokens"])
        return
    context, unit, processes = needed(train.context), facts.unit, machine.processes
    wanted, free = wanted_rows(config, machine), machine.free_memory
    trained = choices.trainable.trained if choices.trainable else parameter_count(architecture)

    def memory(context: int) -> Memory:
        return memory_of_step(
            config, architecture, trainable=choices.trainable, facts=facts, machine=machine, context=context
        )

    def rows_of_each(workers: int) -> int:
        return memory(context).rows(free - 4 * trained * (workers - 1)) // workers // unit * unit

    def need(context: int, rows: int) -> float:
        return memory(context).of(rows)

    if isinstance(train.batch_tokens, int) and batch_rows(config) < processes:
        choices.warnings.append(
            f"train.batch_tokens={train.batch_tokens} are {plural(batch_rows(config), 'row')} for {processes} "
            "processes: some will have none; take more tokens a step or fewer processes"
        )
    workers, why = _workers(config, architecture, machine=machine, rows=wanted)
    if train.workers is None:
        if rows_of_each(workers) < unit:
            workers, why = 1, "memory is too small for more"
        choices.set("train.workers", workers, why)
    fits = rows_of_each(workers)
    if fits < unit:
        shorter = (c for c in (2**e for e in range(20, 3, -1)) if c < context and need(c, unit) <= free)
        short = next(shorter, None)
        advice = f"train.context={short} fits" if short else "choose a smaller model (model.parameters)"
        rows = "one row needs" if unit == 1 else f"{unit} rows need"
        raise OutOfMemory(f"{rows} about {size(need(context, unit))} and {size(free)} are free; {advice}")
    if train.micro_batch is not None:
        if train.micro_batch % unit:
            raise UsageError(f"train.micro_batch={train.micro_batch}: {unit} rows belong together; take a multiple")
        if train.reduce == "canonical" and batch_rows(config) % (train.micro_batch * processes):
            raise UsageError(
                f"train.reduce=canonical shares out whole micro-batches: {batch_rows(config)} rows a step do not "
                f"divide into micro-batches of {train.micro_batch} on {processes} process{'es' * (processes > 1)}"
            )
        if min(train.micro_batch, wanted) > fits:
            raise OutOfMemory(
                f"train.micro_batch={train.micro_batch} needs about {size(need(context, train.micro_batch))} "
                f"and {size(free)} are free; train.micro_batch={fits} fits"
            )
        return
    micro = max(
        unit,
        min(fits, useful_rows(machine.device, wanted, context=context, threads=needed(train.threads), workers=workers)),
    )
    micro = micro // unit * unit
    if train.reduce == "canonical":
        step = batch_rows(config)
        shares = max(processes, math.gcd(step, 8))  # so that a run may move to as many as eight processes
        micro = max((m for m in range(unit, micro + 1, unit) if step % (m * shares) == 0), default=0)
        if not micro:
            raise UsageError(
                f"train.reduce=canonical: the {step} rows of a step (train.batch_tokens) do not divide among "
                f"{processes} processes"
            )
    elif wanted > micro and train.batch_tokens != "full":  # as many for each worker, and if it can be all of one size
        fewest = -(-wanted // (workers * micro))
        even = (n for n in range(fewest, 2 * fewest) if wanted % (workers * n * unit) == 0)
        micro = -(-wanted // (workers * next(even, fewest)))
        micro = -(-micro // unit) * unit
    choices.set("train.micro_batch", int(micro), f"{memory(context).row * micro / 1e6:.0f} MB of activations")


def useful_rows(device: str, rows: int, context: int, threads: int, workers: int) -> int:
    """Rows of a forward pass beyond which nothing is gained, when workers share the rows of a step."""
    tokens = PASS_TOKENS.get(device, PASS_TOKENS["cuda"])
    if device == "cpu":
        tokens *= max(threads // workers, 1)
    return min(-(-rows // workers), max(tokens // context, 1))


def _workers(config: Config, architecture: ModelConfig, machine: Machine, rows: int) -> tuple[int, str]:
    """Threads that compute micro-batches side by side (`core.workers`), as asked or as many as there are.
    Raises UsageError for what keeps a step whole."""
    train, threads = config.train, needed(config.train.threads)
    dropped = architecture.embed_dropout or architecture.attention_dropout or architecture.residual_dropout
    dropped = dropped or config.adapter.dropout
    obstacles = {
        f"runs on {machine.device}": machine.device != "cpu",
        "draws dropout from one generator": bool(dropped),
        "adds up in one order (train.reduce=canonical)": train.reduce == "canonical",
        "is compiled": train.compile is True,
    }
    obstacle = next((name for name, holds in obstacles.items() if holds), None)
    if train.workers is not None:
        if train.workers > 1 and obstacle:
            raise UsageError(f"train.workers={train.workers}: a step that {obstacle} has one; leave the key out")
        if train.workers > threads:
            raise UsageError(f"train.workers={train.workers} are more than train.threads={threads}")
        return train.workers, ""
    if obstacle:
        return 1, f"a step that {obstacle} has one"
    batches = rows // train.micro_batch if train.micro_batch else rows * needed(train.context) // WORKER_TOKENS
    workers = max(min(threads, rows, batches), 1)
    return workers, f"{plural(threads, 'thread')}, {rows * needed(train.context)} tokens a step"


def batch_rows(config: Config) -> int:
    """Rows of a step. Raises UsageError where a step has less than one."""
    train = config.train
    assert isinstance(train.batch_tokens, int) and train.context
    if train.batch_tokens < train.context:
        raise UsageError(
            f"train.batch_tokens={train.batch_tokens} is less than one row of train.context={train.context}"
        )
    return train.batch_tokens // train.context


def step_tokens(config: Config, epoch_tokens: int | None) -> int:
    """Tokens of a step; of the whole text where `train.batch_tokens=full`."""
    if config.train.batch_tokens == "full":
        return needed(epoch_tokens)
    return batch_rows(config) * needed(config.train.context)


def limits(config: Config, measured: Measured) -> list[tuple[int, str]]:
    """The steps that each of the limits comes to, and which it is."""
    train = config.train
    allowed: list[tuple[int, str]] = []
    if train.max_steps:
        allowed.append((train.max_steps, f"train.max_steps={train.max_steps}"))
    if train.max_tokens:
        padding = 1 - measured.fill
        counted, why = (measured.fill, f"; {padding:.0%} padding") if padding > PADDING_COUNTED else (1.0, "")
        steps = int(train.max_tokens / (batch_rows(config) * needed(train.context) * counted))
        allowed.append((max(1, steps), f"train.max_tokens={train.max_tokens}{why}"))
    if train.max_epochs:
        if train.batch_tokens == "full":
            steps = math.ceil(train.max_epochs)
        else:
            steps = math.ceil(needed(measured.rows) / batch_rows(config))
        allowed.append((max(1, steps), f"train.max_epochs={train.max_epochs:g}"))
    return allowed


def most_steps(config: Config, measured: Measured) -> int:
    """The steps that limits other than the clock allow."""
    return min(limits(config, measured), default=(10**15, ""))[0]


def _limit(choices: Choices, facts: Facts, machine: Machine) -> None:
    """Turns tokens, epochs and a time budget into `train.max_steps`, the smallest of all limits."""
    config, train, measured = choices.config, choices.config.train, facts.measured
    if measured is None and (train.time_budget_s or train.max_epochs or train.max_tokens or not train.max_steps):
        choices.leave("train.max_steps", "decided once rows are counted and steps are timed")
        return
    steps, why = min(limits(config, measured or Measured()), default=(10**15, ""))
    if train.time_budget_s:
        timed = needed(measured).with_steps_of(step_tokens(config, facts.epoch_tokens))
        fitting, pace = _steps_in_budget(choices, timed, before=facts.base is not None)
        asked, budget = f"{steps} steps" if steps == train.max_steps else why, train.time_budget_s
        if steps <= fitting:
            why = f"{asked}, within train.time_budget_s={budget:g}"
        else:
            steps, why = fitting, f"{pace}{f'; fewer than {why}' if why else ''}"
        choices.set("train.max_steps", steps, why)
    elif train.max_steps != steps:
        choices.set("train.max_steps", steps, why)


def _steps_in_budget(choices: Choices, measured: Measured, before: bool) -> tuple[int, str]:
    """The steps that fit into what is left of a time budget, beside evaluations: one before step 1 too, where a run
    starts from a model."""
    train = choices.config.train
    budget, left, seconds = needed(train.time_budget_s), measured.left_seconds, measured.step_seconds
    pace = Pace(seconds, measured.eval_seconds)
    end = planned_end(budget, pace)
    if train.eval_every:
        fitting = steps_until(end, budget - left, pace=with_evaluations(pace, train.eval_every), evaluations=before)
    else:
        several = before + evaluations(budget, pace.evaluation) - 1
        fitting = steps_until(end, budget - left, pace=pace, evaluations=several)
    if fitting < 1:
        kept = "what is prepared is kept, so that the same command may do; else " if left < budget / 2 else ""
        raise UsageError(
            f"train.time_budget_s={budget:g}: {budget - left:.0f} s went into preparation, a step takes "
            f"{1000 * seconds:,.0f} ms and an evaluation {duration(pace.evaluation)}; {kept}give more time, a smaller "
            "model or a smaller data.eval_bytes"
        )
    if not can_hold(budget, pace):
        latest = end + (SLOWER - 1) * pace.finish + SLOWER * pace.step
        choices.warnings.append(
            f"train.time_budget_s={budget:g}: a step takes {seconds / budget:.1%} of it, an evaluation with saving "
            f"{pace.finish / budget:.1%}; on a machine that slows down near the end it may last {latest:.0f} s"
        )
    return fitting, f"{duration(left)} of {budget:g} s left, {1000 * seconds:.0f} ms a step"


def evaluations(budget: float, seconds: float) -> int:
    """The number of evaluations of so many seconds each that a time budget gets, the last included."""
    return max(1, min(5, int(EVALUATION_SHARE * budget / max(seconds, 1e-9))))


def set_intervals(choices: Choices, architecture: ModelConfig, facts: Facts, machine: Machine) -> None:
    """Sets how often to evaluate and save, and whether compiling pays, now that the length is known."""
    config, train = choices.config, choices.config.train
    if "train.max_steps" in choices.open or "train.batch_tokens" in choices.open:
        why = "follows from the number of steps"
        for name in ("eval_every", "log_every", "checkpoint_every"):
            if getattr(train, name) is None:
                choices.leave(f"train.{name}", why)
        if train.compile == "auto":
            choices.leave("train.compile", why)
        return
    total, context, processes = needed(train.max_steps), needed(train.context), machine.processes
    full = train.batch_tokens == "full"
    tokens = total * (1 if full else batch_rows(config) * context)
    rate = machine.flops_per_second(train.precision, parameter_count(architecture))
    expected = tokens * flops_per_token(architecture, context, choices.trainable) / rate  # seconds
    if not full:
        passes = total * math.ceil(batch_rows(config) / processes / needed(train.micro_batch))
        expected = max(expected, passes * architecture.num_hidden_layers * BLOCK_SECONDS.get(machine.device, 0.0))
    if train.eval_every is None:
        _space_evaluations(choices, architecture, facts=facts)
    if train.log_every is None:
        apart = min(max(total // LOGGED_POINTS, 1), LOG_APART)
        choices.set("train.log_every", apart, f"about {total // apart} points of a curve")
    if train.checkpoint_every is None:
        between, why = total / 10, "at most ten, of which two are kept"
        if not train.time_budget_s and not full:
            between = max(between, total * CHECKPOINT_SECONDS / expected)
            why = "at most ten, not too often; two are kept"
        if between > total / 2:
            between, why = total / 2, "at least one on the way, of which two are kept"
        choices.set("train.checkpoint_every", min(math.ceil(between), total), why)
    if train.compile == "auto":
        _compile(choices, architecture, machine=machine, expected=expected)
    elif train.compile and not machine.compiles:
        needs = "Triton and a C compiler" if machine.device == "cuda" else "a C++ compiler (g++ or clang++)"
        raise UsageError(f"train.compile=true needs {needs} here; install what is missing or use auto")


def _space_evaluations(choices: Choices, architecture: ModelConfig, facts: Facts) -> None:
    """Ten evaluations in a run, or as many as take EVALUATION_SHARE of it: of a time budget by the clock, else by
    arithmetic, so that equal commands stay equal. Where evaluations are to end the run, all ten."""
    config, train, steps = choices.config, choices.config.train, needed(choices.config.train.max_steps)
    times, cost, why = 10, 0.0, ""
    if train.time_budget_s:
        times = evaluations(train.time_budget_s, needed(facts.measured).eval_seconds)
    elif facts.eval_tokens:
        step = step_tokens(config, facts.epoch_tokens)
        passes = 2 if architecture.num_experts else 1  # the use of experts is looked at in another
        cost = EVALUATION_COST * facts.eval_tokens * passes / (steps * step)
        if train.patience is None and train.target_loss is None:
            times = max(1, min(times, int(EVALUATION_SHARE / (1 - EVALUATION_SHARE) / cost)))
    apart = math.ceil(steps / times)
    count = math.ceil(steps / apart)
    if cost:
        share = count * cost / (1 + count * cost)
        why = f", {100 * share:.0f} % of the run" if share >= 0.01 else ", less than 1 % of the run"
    said = f"{count} evaluations" if count > 1 else "one evaluation, at the end"
    choices.set("train.eval_every", apart, said + why)


def _compile(choices: Choices, architecture: ModelConfig, machine: Machine, expected: float) -> None:
    """Compiles where it saves more of the expected seconds than it takes."""
    train, kind = choices.config.train, machine.device
    takes, gain = COMPILE_SECONDS.get(kind, math.inf), COMPILE_GAIN.get(kind, 0.0)
    wanted = {
        "several workers compute side by side": train.workers == 1,
        "a step of the whole text has rows left over": train.batch_tokens != "full",
        "experts get batches of other sizes at each step": not architecture.num_experts
        or (kind == "cuda" and train.precision in ("bf16", "fp8")),  # elsewhere each batch has other sizes
    }
    lacking = next((what for what, there in wanted.items() if not there), None)
    pays = expected * gain > takes and not lacking and machine.compiles
    cost = f"compiling takes {takes:.0f} s and saves some {gain:.0%}"
    why = lacking or f"about {duration(expected)} of training; {cost}"
    choices.set("train.compile", bool(pays), why)
