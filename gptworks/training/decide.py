"""From what was asked to a run that is ready to start: facts and machine, choices, model, timings, choices again."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from gptworks.core import config as configuration
from gptworks.core import runtime
from gptworks.core.config import Chosen, Config
from gptworks.core.errors import DataError, UsageError
from gptworks.core.log import console, plural, size
from gptworks.model.build import Loaded
from gptworks.planning.choices import Base, Choices, Facts, Measured
from gptworks.planning.choose import choose, memory_of_step, most_steps, step_tokens, wanted_rows
from gptworks.planning.machine import Machine, here
from gptworks.training.assemble import Run, architecture_of, assemble, bytes_per_weight, layout_of
from gptworks.training.optim import make_optimizers
from gptworks.training.problem import Problem
from gptworks.training.timing import measure


@dataclass(frozen=True)
class Decided:
    """A run that is ready to start, and what it was decided from."""

    run: Run
    choices: Choices
    facts: Facts
    machine: Machine
    measured: Measured
    most_steps: int  # that limits other than the clock allow


def facts_of(config: Config, problem: Problem, base: Loaded | None) -> Facts:
    """The known facts of the data and of the model that the run starts from."""
    return Facts(
        vocab_size=len(problem.tokenizer),
        vocabulary=problem.vocabulary,
        epoch_tokens=problem.epoch_tokens,
        endless=problem.epoch_tokens is None,
        eval_tokens=problem.eval_tokens,
        unigram_bits=problem.unigram_bits,
        bytes_per_token=problem.bytes_per_token,
        prompts=problem.prompts(_most_tokens(config, base) // 2) if config.generate.prompts is None else None,
        base=None if base is None else Base(base.name, base.model.config, base.adapter, sha256=base.own_sha256),
        unit=problem.unit,
        beside_bytes=problem.beside.bytes,
        bytes_per_weight=bytes_per_weight(config, base),
    )


def decide(
    config: Config, problem: Problem, base: Loaded | None, clock: Callable[[], float] = runtime.process_seconds
) -> Decided:
    """Chooses, builds the model, times steps where there is a time budget, and chooses to the end. `clock` gives the
    seconds since the command began. Raises UsageError, OutOfMemory."""
    facts = facts_of(config, problem, base)
    _check_prompts(config, problem, base)
    machine = here(config.train.precision, config.train.threads)
    first = choose(config, facts, machine)
    for warning in first.warnings:
        console.warn(warning)
    run = _built(first.provisional, problem, base)
    measured = measure(run, run.start(), clock)
    facts = replace(facts, measured=measured)
    choices = choose(config, facts, machine)
    for warning in choices.warnings[len(first.warnings) :]:
        console.warn(warning)
    run.config = choices.chosen
    run.layout = layout_of(run.config)
    run.state.optimizers = make_optimizers(run.state.model, run.config.train)
    _apply(run.config)
    return Decided(
        run,
        choices,
        facts=facts,
        machine=machine,
        measured=measured.with_steps_of(step_tokens(run.config, facts.epoch_tokens)),
        most_steps=most_steps(
            configuration.with_values(choices.config, {"train.max_steps": config.train.max_steps}), measured
        ),
    )


def provisional(config: Config, problem: Problem, base: Loaded | None) -> Run:
    """A run whose length is not decided, for what only tries steps on it."""
    choices = choose(config, facts_of(config, problem, base), here(config.train.precision, config.train.threads))
    return _built(choices.provisional, problem, base)


def reopened(config: Chosen, problem: Problem, base: Loaded | None) -> Run:
    """A run that was decided before, as its configuration says; where memory is short now, it is only warned of."""
    _check_prompts(config, problem, base)
    run, facts = _built(config, problem, base), facts_of(config, problem, base)
    machine = here(config.train.precision, config.train.threads)
    architecture = architecture_of(config, problem, base)
    memory = memory_of_step(
        config, architecture, trainable=run.trainable, facts=facts, machine=machine, context=config.train.context
    )
    rows = min(config.train.micro_batch, wanted_rows(config, machine))
    need, free = memory.of(rows), machine.free_memory
    if need > free:
        console.warn(f"a step needs about {size(need)} and {size(free)} are free")
    return run


def _built(config: Chosen, problem: Problem, base: Loaded | None) -> Run:
    _apply(config)
    return assemble(config, problem, base)


def _apply(config: Chosen) -> None:
    train = config.train
    runtime.apply(runtime.device(), train.threads, deterministic=train.deterministic, compiles=train.compile)


def _most_tokens(config: Config, base: Loaded | None) -> int:
    """The tokens that the model sees at once."""
    return base.model.config.max_position_embeddings if base else config.train.context or 256


def _check_prompts(config: Config, problem: Problem, base: Loaded | None) -> None:
    """Raises UsageError for a prompt that could not be continued: an error now, and not after the training."""
    if "generate" not in problem.sections:
        return
    context = _most_tokens(config, base)
    for prompt in config.generate.prompts or []:
        try:
            size = len(problem.tokenizer.front + problem.tokenizer.encode(prompt))
        except DataError as error:
            raise UsageError(
                f"generate.prompts: {prompt[:40]!r}: {error}; generate.prompts=null takes some from the text"
            ) from None
        if size >= context:
            raise UsageError(
                f"generate.prompts: {prompt[:40]!r} has {plural(size, 'token')}; the model takes fewer than {context:,}"
            )
