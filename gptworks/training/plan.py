"""Three sizes of model for a text and a time: what each would see, take and reach, before anything is trained.

The run's own decisions are asked (`planning.choose`), from a look at a part of the text, and from steps timed on it.
"""

import json
import math
import shlex
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from gptworks.core import config as configuration
from gptworks.core.config import Chosen, Config
from gptworks.core.errors import OutOfMemory, UsageError
from gptworks.core.log import count, size
from gptworks.core.results import Planned, PlannedSize
from gptworks.data.glance import Glance, glance
from gptworks.data.shards import Shards, Stream
from gptworks.infer.scoring import unigram
from gptworks.model.config import ModelConfig, parameter_count
from gptworks.planning.choices import Choices, Facts, Measured, needed
from gptworks.planning.choose import EVALUATION_COST, choose, memory_of_step, step_tokens
from gptworks.planning.cost import flops_per_token
from gptworks.planning.forecast import likely_bits, share_of_counting
from gptworks.planning.machine import Machine, Precision, here, usual_precision
from gptworks.training.assemble import assemble
from gptworks.training.pretraining import Pretraining
from gptworks.training.timing import timings

Asked = list[str] | dict[str, Any]  # settings, as texts or by key
SHORT_TEXT = 100_000  # bytes; all that was measured is longer
WORTH_NOTING = 0.02  # of bits per byte
DISTINCT = 1.2  # how many times, at least, for a row of its own
APART = 3  # how many times larger or smaller the sizes beside the chosen one are
EVALUATED = 50_000  # tokens of the text that an evaluation is timed on
PROCESS_BYTES = {"cpu": 400_000_000}  # that Python and torch take beside a step
START_SECONDS = 3.0  # of a process, until it reads its text
SHAPE = ("parameters", "depth", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
         "head_dim", "intermediate_size")  # fmt: skip


def plan(recipe: str, asked: Asked, there: Machine | None = None) -> Planned:
    """Plans the run of a recipe with what is asked beside it, and one of a smaller and of a larger model; with the time
    on another machine, where one is described. Raises DataError, UsageError, OutOfMemory."""
    config = configuration.load(recipe, asked)
    if config.problem.kind != "pretraining":
        raise UsageError(f"a plan is for a model that is trained on a text, and not for problem={config.problem.kind}")
    if config.model.path:
        raise UsageError("a plan is for a new model; one that is there has its size")
    if config.train.find_lr:
        raise UsageError("a plan is for a training: leave train.find_lr out")
    Pretraining.check(config)
    own = here(config.train.precision, config.train.threads)
    planner = _Planner(glance(config.data, config.tokenizer), own)
    first = choose(config, planner.facts, own)
    middle, sizes, left_out = parameter_count(needed(first.architecture)), list[PlannedSize](), list[str]()
    for name, share in (("smaller", 1 / APART), ("chosen", 1.0), ("larger", APART)):
        sized = config if name == "chosen" else _sized(config, middle * share)
        try:
            if name != "chosen" and planner.apart(sized, middle) < DISTINCT:
                continue  # no other shape is nearer to that
            _, planned = planner.size(sized, name)
        except (OutOfMemory, UsageError) as error:
            if name == "chosen":
                raise
            left_out.append(f"{name} {error}")
            continue
        command = _command(recipe, asked, None if name == "chosen" else planned.parameters)
        there_seconds = _seconds(planned, there, config) if there else None
        sizes.append(replace(planned, command=command, seconds_there=there_seconds))
    text = planner.text
    return Planned(
        data=config.data.places, bytes=text.train_bytes + text.eval_bytes, exact=text.complete,
        tokens=text.train_tokens, bytes_per_token=text.bytes_per_token, vocab_size=len(text.tokenizer),
        time_budget_s=config.train.time_budget_s, machine=own.name,
        matmul_gflops=own.rate(needed(first.config.train.precision)) / 1e9,
        there=_described(there, config, middle) if there else None, sizes=sizes,
        notes=_notes(text, config.tokenizer.kind, sizes), left_out=left_out,
    )  # fmt: skip


def outlook(config: Config, machine: Machine) -> tuple[Choices, PlannedSize]:
    """Tells what the run of a configuration would decide on a machine, and what it would see, take and reach, by its
    shape and a look at the text alone. Raises DataError, UsageError, OutOfMemory."""
    return _Planner(glance(config.data, config.tokenizer), machine).size(config, timed=False)


@dataclass
class _Planner:
    """A text that was looked at, and the machine that models are planned for."""

    text: Glance
    machine: Machine

    @cached_property
    def facts(self) -> Facts:
        """The facts of the text, as far as a part of it tells them."""
        text = self.text
        return Facts(
            vocab_size=len(text.tokenizer), vocabulary=text.vocabulary, epoch_tokens=text.train_tokens,
            eval_tokens=text.eval_tokens, unigram_bits=unigram(self._shards(0).eval)["bits_per_byte"],
            bytes_per_token=text.bytes_per_token,
        )  # fmt: skip

    def size(self, config: Config, name: str = "chosen", timed: bool = True) -> tuple[Choices, PlannedSize]:
        """Plans one size: by steps that are timed here on the part of the text, or by the shape alone."""
        facts, machine = self.facts, self.machine
        first = choose(config, facts, machine)
        provisional, architecture = first.provisional, needed(first.architecture)
        beginning, epoch = START_SECONDS + self.text.seconds, needed(facts.epoch_tokens)
        measured = replace(
            self._timed(provisional) if timed else self._expected(provisional, architecture),
            rows=math.ceil((provisional.train.max_epochs or 0) * epoch / provisional.train.context),
            left_seconds=(provisional.train.time_budget_s or 0.0) - beginning,
        )
        choices = choose(config, replace(facts, measured=measured), machine)
        chosen, parameters = choices.chosen, parameter_count(architecture)
        step, steps, context = step_tokens(chosen, epoch), chosen.train.max_steps, chosen.train.context
        training = measured.with_steps_of(step).step_seconds * steps
        evaluating = measured.eval_seconds * math.ceil(steps / chosen.train.eval_every)
        memory = memory_of_step(
            chosen, architecture, trainable=choices.trainable, facts=facts, machine=machine, context=context
        )
        tokens, rows = steps * step, -(-step // (context * machine.processes))
        return choices, PlannedSize(
            name=name, parameters=parameters, width=architecture.hidden_size, layers=architecture.num_hidden_layers,
            context=context, batch_tokens=step, steps=steps, tokens=tokens, tokens_per_parameter=tokens / parameters,
            passes=tokens / epoch,
            memory_bytes=PROCESS_BYTES.get(machine.device, 0) + memory.of(min(chosen.train.micro_batch, rows)),
            flops=flops_per_token(architecture, context) * tokens, seconds=beginning + training + evaluating,
            bits_per_byte=self._reached(parameters, tokens),
        )  # fmt: skip

    def apart(self, config: Config, parameters: int) -> float:
        """The factor between a size and another."""
        other = parameter_count(needed(choose(config, self.facts, self.machine).architecture))
        return max(other, parameters) / min(other, parameters)

    def _reached(self, parameters: int, tokens: int) -> float:
        """The bits per byte that are likely."""
        facts, text = self.facts, self.text
        share = share_of_counting(parameters, tokens * text.bytes_per_token, text.train_bytes)
        return likely_bits(
            share, needed(facts.unigram_bits), vocab_size=needed(facts.vocab_size), bytes_per_token=text.bytes_per_token
        )

    def _timed(self, config: Chosen) -> Measured:
        """The seconds of a step and of an evaluation, by some that are tried."""
        problem = Pretraining(self._shards(4 * step_tokens(config, self.facts.epoch_tokens)))
        unweighted = configuration.with_values(config, {"data.train": config.data.places})
        measured = timings(assemble(unweighted, problem, None))
        longer = needed(self.facts.eval_tokens) / needed(problem.eval_tokens)
        return replace(measured, eval_seconds=measured.eval_seconds * longer)

    def _expected(self, config: Chosen, architecture: ModelConfig) -> Measured:
        """The seconds of a step and of an evaluation, by the shape and the machine's rate."""
        step, context = step_tokens(config, self.facts.epoch_tokens), config.train.context
        token = flops_per_token(architecture, context) / self._rate(config, architecture)
        evaluation = EVALUATION_COST * needed(self.facts.eval_tokens) * token
        return Measured(step_seconds=step * token, step_tokens=step, eval_seconds=evaluation)

    def _rate(self, config: Chosen, architecture: ModelConfig) -> float:
        return self.machine.flops_per_second(config.train.precision, parameter_count(architecture))

    def _shards(self, least: int) -> Shards:
        """The part of the text that was read, repeated to at least so many ids, as shards in memory."""
        text = self.text
        start = [] if text.tokenizer.start_id is None else [text.tokenizer.start_id]
        ids = np.concatenate([np.append(np.array(start, np.uint32), document) for document in text.documents])
        ids = np.resize(ids, max(len(ids), least, 2))
        train = Stream(ids, np.array([0]), bytes=round(len(ids) * text.bytes_per_token), largest_id=int(ids.max()))
        held_out = ids[-EVALUATED:]
        evaluated = replace(train, tokens=held_out, bytes=round(len(held_out) * text.bytes_per_token))
        files = {f"{split}.tokens": {"sha256": ""} for split in ("train", "eval")}
        return Shards(Path(), text.tokenizer, train=train, eval=evaluated, manifest={"files": files})


def _notes(text: Glance, kind: str, sizes: list[PlannedSize]) -> list[str]:
    """Says what the figures of a plan are worth."""
    notes, nearly = list[str](), 1 - WORTH_NOTING
    if text.train_bytes < SHORT_TEXT:
        notes.append(f"bits/byte are little more than a guess for a text below {size(SHORT_TEXT)}")
    elif kind != "bpe":
        notes.append("bits/byte are forecast from runs with BPE; with characters or bytes they may be a quarter off")
    chosen, best = (next(s for s in sizes if s.name == "chosen"), min(sizes, key=lambda s: s.bits_per_byte))
    if best.bits_per_byte < nearly * chosen.bits_per_byte:
        if best.parameters > text.train_bytes:
            notes.append(f"{best.name} has more parameters than the text has bytes, of which nothing was measured")
        else:
            notes.append(
                f"{best.name} is likely to do better than chosen, by the steps that were timed now; a run chooses "
                "before it times any"
            )
    return notes


def _sized(config: Config, parameters: float) -> Config:
    """The configuration with a model of about so many parameters."""
    shape: dict[str, Any] = dict.fromkeys((f"model.{name}" for name in SHAPE), None)
    in_two_digits = int(round(parameters, 2 - len(f"{parameters:.0f}")))
    return configuration.with_values(config, {**shape, "model.parameters": in_two_digits})


def _command(recipe: str, asked: Asked, parameters: int | None) -> str:
    """The command that starts the run, of another size than what was asked where `parameters` names one."""
    settings = dict[str, Any]()
    for key, value in configuration.pairs_of(asked):  # a section as a mapping is its keys
        whole = isinstance(value, dict) and "." not in key
        settings |= {f"{key}.{name}": each for name, each in value.items()} if whole else {key: value}
    if parameters:
        settings = {key: value for key, value in settings.items() if key not in {f"model.{name}" for name in SHAPE}}
        settings["model.parameters"] = count(parameters)
    written = (
        f"{key}={value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}"
        for key, value in settings.items()
    )
    return shlex.join(["gptworks", "run", recipe, *written])


def _precision(machine: Machine, config: Config) -> Precision:
    """The precision that a run computes in there."""
    asked = config.train.precision
    return usual_precision(machine.bf16, machine.fp16) if asked == "auto" else asked


def _seconds(size: PlannedSize, machine: Machine, config: Config) -> float:
    """The seconds that training takes there."""
    return size.flops / machine.flops_per_second(_precision(machine, config), size.parameters)


def _described(machine: Machine, config: Config, parameters: int) -> str:
    """A machine in words, with the share of its rate that is counted with for a model of so many parameters."""
    precision = _precision(machine, config)
    rate = machine.rate(precision) * machine.processes
    name = machine.name if machine.processes == 1 else f"{machine.processes} times {machine.name}"
    share = machine.flops_per_second(precision, parameters) / rate
    return f"{name}, at {share:.0%} of {rate / 1e12:,.3g} TFLOP/s ({precision})"
