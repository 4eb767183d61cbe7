"""A run out of its parts: the model as the choices describe it, its optimizers, and the problem started with both."""

from dataclasses import dataclass

import torch

from gptworks.core.config import Chosen, Config
from gptworks.core.errors import UsageError
from gptworks.core.ranks import ranks
from gptworks.core.registry import class_of
from gptworks.core.runtime import device, dtype_of
from gptworks.data.batch import Batches
from gptworks.model import build
from gptworks.model.build import Loaded
from gptworks.model.config import ModelConfig, build_config
from gptworks.model.lowbit import scheme
from gptworks.model.transformer import Transformer, copy_of
from gptworks.model.transforms import transformed
from gptworks.planning.choose import trainable_part
from gptworks.planning.cost import Trainable
from gptworks.training.loop import Layout
from gptworks.training.metrics import LOGGED
from gptworks.training.optim import make_optimizers
from gptworks.training.problem import Evaluator, Problem, Work, check_names, checked
from gptworks.training.state import State


@dataclass
class Run:
    """A run that is ready to start."""

    config: Chosen
    problem: Problem
    base: Loaded | None
    state: State
    layout: Layout
    trainable: Trainable | None  # where not all of the model is trained
    stop_ids: tuple[int, ...]  # that end a text

    def start(self, state: State | None = None) -> Work:
        """The problem's batches, objective and evaluation for the run's model, or for that of another state."""
        state = state or self.state
        who = f"{class_of(self.problem)}.start"
        before = _parameters(state.model)
        work = checked(self.problem.start(state.model, self.config, ranks.data, state.values), Work, who)
        after = _parameters(state.model)
        if changed := [name for name in {**before, **after} if before.get(name) != after.get(name)]:
            raise UsageError(
                f"{who} changes what is trained ({changed[0]}): no checkpoint would fit, and each "
                "continuation would do it again; leave the parameters of the model as they are (adapter=lora trains a "
                "part)"
            )
        for name in ("figures", "weight", "loss"):
            if not hasattr(work.objective, name):
                raise UsageError(f"{class_of(work.objective)} has no {name}: see gptworks/training/objectives.py")
        check_names(work.objective.figures, f"{class_of(work.objective)}.figures", taken=LOGGED)
        checked(work.batches, Batches, f"{who} as batches")
        checked(work.evaluate, Evaluator, f"{who} as evaluation")
        return work


def _parameters(model: Transformer) -> dict[str, tuple[bool, torch.Size, torch.dtype, int]]:
    """The facts of each parameter that a checkpoint depends on, and how often its values were set."""
    return {name: (p.requires_grad, p.shape, p.dtype, p._version) for name, p in model.named_parameters()}


def assemble(config: Chosen, problem: Problem, base: Loaded | None) -> Run:
    """Builds the model and its optimizers. Raises UsageError."""
    tokenizer = problem.tokenizer
    architecture = architecture_of(config, problem, base)
    model = build.fresh(architecture, config.train.seed) if base is None else _copy_of_base(base, config)
    layout = layout_of(config)
    state = State(transformed(model, config).to(layout.device), [])
    state.optimizers = make_optimizers(state.model, config.train)
    own = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
    trainable = trainable_part(config, architecture, bytes_per_weight(config, base))
    stop_ids = base.stop_ids if base else own
    return Run(config, problem, base=base, state=state, layout=layout, trainable=trainable, stop_ids=stop_ids)


def architecture_of(config: Chosen, problem: Problem, base: Loaded | None) -> ModelConfig:
    """The shape of the model that is trained."""
    if base is not None:
        return base.model.config
    return build_config(config.model, len(problem.tokenizer), config.train.context)


def layout_of(config: Chosen) -> Layout:
    """The layout of a step on this machine."""
    train = config.train
    return Layout(device(), dtype_of(train.precision), micro_batch=train.micro_batch, compile=train.compile)


def bytes_per_weight(config: Config, base: Loaded | None) -> float | None:
    """Bytes that a weight takes in the low-bit form that `adapter.base` names; None where it names none."""
    begun = base.adapter.base if base and base.adapter else None
    form = begun or config.adapter.base
    if form in (None, "fp32", "bf16") or base is None:
        return None
    return scheme(form).bytes_per_weight(base.model.config.hidden_size)


def _copy_of_base(base: Loaded, config: Chosen) -> Transformer:
    """A copy of the base's model; without adapters all of it is trained, else it shares all weights with the base."""
    if base.adapter and config.adapter.kind is None:
        raise UsageError(f"{base.name} is an adapter: train it further with adapter=lora, or `gptworks merge` it first")
    return copy_of(base.model.requires_grad_(config.adapter.kind is None))


@torch.no_grad()
def trial_of(run: Run) -> State:
    """A state of the run's beginning with a model of its own, to try steps on."""
    state = State(copy_of(run.state.model), [])
    state.optimizers = make_optimizers(state.model, run.config.train)
    return state
