"""The state of a run and its checkpoints.

A checkpoint is a new directory with safetensors, JSON and a hashed manifest, put in place by one rename; two are kept
and a reader takes the newest that verifies. There is no random state to store: every draw of a step is a function of
(seed, step, row) (`runtime.seed_everything`), and the loader's place is two integers.
"""

import hashlib
import json
import math
import operator
import re
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptworks.core import folder
from gptworks.core.errors import DataError, NotFinite
from gptworks.core.failpoint import failpoint
from gptworks.core.log import console
from gptworks.data.batch import Cursor
from gptworks.model import weights as weight_files
from gptworks.model.transformer import Transformer
from gptworks.training.optim import Optimizer

KEPT = 2
NAME = re.compile(r"^step-(\d{8})$")
WINDOW = 128  # gradient norms that a spike is judged by
COUNTERS: dict[str, Any] = {
    "step": int, "tokens": int, "best_figure": float | None, "evals_since_best": int, "skipped": int, "norms": list,
    "seconds": float, "stopped": str | None, "scale": float, "steps_since_scaled": int, "values": dict,
}  # fmt: skip
BESIDE = ("seconds", "stopped", "unlogged")  # what no step depends on


@dataclass
class Sums:
    """The measurements of the steps since the last logged row, added up."""

    loss: float = 0.0  # times the weight
    weight: float = 0.0
    tokens: int = 0
    seconds: float = 0.0
    data_seconds: float = 0.0  # of those, waiting for batches
    figures: dict[str, tuple[float, float]] = field(default_factory=dict)  # of the objective: sum and weight

    @classmethod
    def of(cls, values: Any) -> "Sums":
        """Reads the sums that a checkpoint keeps. Raises TypeError, ValueError."""
        plain = {name: float(value) for name, value in values.items() if name not in ("tokens", "figures")}
        figures = {str(name): (float(total), float(weight)) for name, (total, weight) in values["figures"].items()}
        return cls(**plain, tokens=operator.index(values["tokens"]), figures=figures)


@dataclass
class State:
    """Everything the next step depends on."""

    model: Transformer
    optimizers: list[Optimizer]
    step: int = 0  # optimizer steps done
    tokens: int = 0  # targets trained on
    cursor: Cursor = field(default_factory=Cursor)
    best_figure: float | None = None  # the best of the watched figure so far
    evals_since_best: int = 0
    skipped: int = 0  # steps left out as spikes, or in fp16 for a gradient beyond its range
    scale: float = 2.0**16  # of the loss in fp16, so that small gradients are not lost
    steps_since_scaled: int = 0
    values: dict[str, Any] = field(default_factory=dict)  # plain ones of the problem's own
    norms: list[float] = field(default_factory=list)  # the last gradient norms, where spikes are looked for
    average: dict[str, Tensor] = field(default_factory=dict)  # of the weights (train.ema), else empty
    best: dict[str, Tensor] = field(default_factory=dict)  # the weights of the best figure (train.patience), else empty
    seconds: float = 0.0  # of training, over all of the run's processes
    stopped: str | None = None  # why the run ended, once it has
    unlogged: Sums = field(default_factory=Sums)  # so that a resumed run logs what one that was not stopped does
    reader: "Saving | None" = None  # a checkpoint in the making, which still reads the tensors

    def settle(self) -> None:
        """To be called before a tensor changes: waits until a checkpoint in the making has read them all."""
        if self.reader is not None:
            self.reader.read.wait()

    def trained(self) -> dict[str, Tensor]:
        """The parameters that training changes, by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def groups(self) -> dict[str, dict[str, Tensor]]:
        """Every tensor that training changes, by file of a checkpoint: weights by name, optimizer state by
        `<optimizer>.<parameter>.<slot>`, and the average and the best weights where the run keeps them."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        slots = {
            f"{number}.{names[id(parameter)]}.{slot}": value
            for number, optimizer in enumerate(self.optimizers)
            for parameter, values in optimizer.state.items()
            for slot, value in values.items()
        }
        weights = {name: p.detach() for name, p in self.trained().items()}
        kinds = {"model": weights, "optimizer": slots, "average": self.average, "best": self.best}
        return {name: group for name, group in kinds.items() if group or name in ("model", "optimizer")}

    def counters(self) -> dict[str, Any]:
        values = {key: getattr(self, key) for key in COUNTERS}
        own = json.loads(json.dumps(self.values, allow_nan=False))  # as a checkpoint gives them back
        plain = {"cursor": asdict(self.cursor), "unlogged": asdict(self.unlogged)}
        return values | plain | {"norms": list(self.norms), "values": own}

    def fingerprint(self) -> str:
        """SHA-256 over every bit that decides the next step: all tensors and counters, not the clock."""
        digest = hashlib.sha256()
        for group, tensors in self.groups().items():
            for name in sorted(tensors):
                digest.update(f"{group} {name}".encode())
                digest.update(_bits(tensors[name]))
        counters = {key: value for key, value in self.counters().items() if key not in BESIDE}
        digest.update(json.dumps(counters, sort_keys=True).encode())
        return digest.hexdigest()

    def difference(self, other: "State") -> str | None:
        """None if the two are identical to the bit, else the first thing that differs."""
        ours, theirs = self.groups(), other.groups()
        for group in ours.keys() | theirs.keys():
            kind = {"model": "weight", "optimizer": "optimizer state"}.get(group, group)
            mine, yours = ours.get(group, {}), theirs.get(group, {})
            if mine.keys() != yours.keys():
                return f"{kind} {sorted(mine.keys() ^ yours.keys())[0]} is in only one of them"
            for name, value in mine.items():
                if _bits(value) != _bits(yours[name]):
                    most = float((value.cpu().double() - yours[name].cpu().double()).abs().max())
                    return f"{kind} {name} differs by up to {most:.3g}"
        counters, others = self.counters(), other.counters()
        for key in counters:
            if counters[key] != others[key] and key not in BESIDE:
                return f"{key} is {counters[key]} and {others[key]}"
        return None


@contextmanager
def using(model: Transformer, weights: dict[str, Tensor]) -> Iterator[None]:
    """The model with other weights while the block runs; with its own where there are none. Nothing is copied."""
    parameters = dict(model.named_parameters())
    own = {name: parameters[name].data for name in weights}
    for name, value in weights.items():
        parameters[name].data = value.to(parameters[name].device)
    try:
        yield
    finally:
        for name, value in own.items():
            parameters[name].data = value


def _bits(value: Tensor) -> bytes:
    return value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


# -- writing -----------------------------------------------------------------------------------------------------


class Saving(threading.Thread):
    """Writes `checkpoints/step-N` beside the training, then removes all but the newest two.

    Nothing is copied on a CPU: the weights rest during the forward and backward passes, and who changes them waits for
    `read` first (`State.settle`). `facts` (identity of data and base; threads and versions, to look at) are kept beside
    the counters for who reads them. What goes wrong is raised by `finish`, and nothing is said to be saved before it is
    durable.
    """

    def __init__(self, state: State, checkpoints: Path, facts: dict[str, Any]) -> None:
        super().__init__(daemon=True, name="checkpoint")
        self.step, self.checkpoints = state.step, checkpoints
        self.path = checkpoints / f"step-{state.step:08d}"
        self.groups = {name: _on_cpu(group) for name, group in state.groups().items()}
        self.text = json.dumps({**state.counters(), **facts}, indent=2) + "\n"
        self.read = threading.Event()
        if next(state.model.parameters()).is_cuda:  # copied, so nothing has to wait
            self.read.set()
        self.error: BaseException | None = None
        state.reader = self

    def run(self) -> None:
        try:
            if not (self.path.is_dir() and _is_good(self.path)):
                self._write()
            console.now_and_then(f"saved    {self.path}")
            for old in listing(self.checkpoints)[:-KEPT]:
                failpoint("checkpoint.rotate")
                shutil.rmtree(old, ignore_errors=True)
        except BaseException as error:
            self.error = error
        finally:
            self.groups = {}
            self.read.set()

    def _write(self) -> None:
        hashes: dict[str, str] = {}
        with folder.commit(self.path, known=hashes) as aside:
            for name, tensors in self.groups.items():
                hashes[f"{name}.safetensors"] = weight_files.write(aside / f"{name}.safetensors", tensors)
            self.read.set()
            (aside / "state.json").write_text(self.text)

    def finish(self) -> Path:
        """Waits until the checkpoint is durable. Raises NotFinite, StorageError."""
        self.join()
        if isinstance(self.error, NotFinite):
            raise NotFinite(f"{self.error} at step {self.step}; nothing was written, the last checkpoint stands")
        if self.error is not None:
            raise self.error
        return self.path


def save(state: State, checkpoints: Path, facts: dict[str, Any]) -> Path:
    """Writes a checkpoint and waits for it."""
    saving = Saving(state, checkpoints, facts)
    saving.start()
    return saving.finish()


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors where a file can be written from: themselves on a CPU, copies from an accelerator."""
    return {name: value.detach().cpu().contiguous() for name, value in tensors.items()}


def _is_good(path: Path) -> bool:
    try:
        folder.verify(path)
    except DataError:
        shutil.rmtree(path, ignore_errors=True)
        return False
    return True


# -- reading -----------------------------------------------------------------------------------------------------


def listing(checkpoints: Path) -> list[Path]:
    """Checkpoints by step, oldest first; whatever has another name is none."""
    if not checkpoints.is_dir():
        return []
    return sorted(path for path in checkpoints.iterdir() if NAME.match(path.name) and path.is_dir())


def newest_good(checkpoints: Path) -> Path | None:
    """The newest checkpoint that verifies. A damaged one is reported, set aside, and the one before it taken.

    Raises DataError if there are checkpoints and none is good, however often it is called: a run never starts over by
    accident.
    """
    damaged: list[Path] = []
    for path in reversed(listing(checkpoints)):
        try:
            folder.verify(path)
        except DataError as error:
            console.warn(f"damaged checkpoint: {error}")
            damaged.append(path)
            continue
        for bad in damaged:  # only now that there is a good one
            aside = bad.with_name(f"{bad.name}.damaged")
            with folder.storage_errors(bad):
                shutil.rmtree(aside, ignore_errors=True)
                bad.rename(aside)
        if damaged:
            console.warn(f"continuing from {path}; the damaged one is set aside")
        return path
    if damaged:
        raise DataError(f"{checkpoints}: no checkpoint is undamaged; --fresh starts the run over")
    return None


def restore(state: State, path: Path) -> dict[str, Any]:
    """Fills a newly made state from a verified checkpoint; returns the facts stored with it. Raises DataError."""
    failpoint("checkpoint.restore")
    facts = folder.read_json(path / "state.json")
    if not isinstance(facts, dict):
        raise DataError(f"{path}: not a checkpoint of this version: {type(facts).__name__}")
    added = {"scale": state.scale, "steps_since_scaled": 0, "values": {}, "unlogged": asdict(Sums())}  # since 0.1.0
    facts = added | {"best_figure" if key == "best_loss" else key: value for key, value in facts.items()}
    parameters = state.trained()
    try:
        for key, kind in COUNTERS.items():
            if not isinstance(facts[key], kind):
                raise TypeError(f"{key} is {str(facts[key])[:80]}")
        if not all(isinstance(norm, float) for norm in facts["norms"]):
            raise TypeError("norms")
        cursor, unlogged = Cursor(**facts["cursor"]), Sums.of(facts["unlogged"])
    except (KeyError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise DataError(f"{path}: not a checkpoint of this version: {type(error).__name__}: {error}") from None
    weights = _weights(path / "model.safetensors", parameters)
    average, best = (
        _weights(file, parameters) if (file := path / f"{name}.safetensors").is_file() else {}
        for name in ("average", "best")
    )
    slots = _slots(path / "optimizer.safetensors", state, parameters)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    state.average = {name: value.to(parameters[name].device) for name, value in average.items()}
    state.best = best
    for (number, name, slot), value in slots.items():
        parameter = parameters[name]
        state.optimizers[number].state[parameter][slot] = value.to(parameter.device)
    for key in COUNTERS:
        setattr(state, key, facts[key])
    state.cursor, state.unlogged = cursor, unlogged
    return facts


def _weights(file: Path, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights in a file, which are those of the model. Raises DataError."""
    shapes = weight_files.read_shapes(file, len(parameters))
    if shapes.keys() != parameters.keys():
        raise DataError(f"{file}: holds another model: {sorted(shapes.keys() ^ parameters.keys())[0][:200]}")
    for name, shape in shapes.items():
        if shape != parameters[name].shape:
            raise DataError(f"{file}: holds another model: {name} is {weight_files.shown(shape)} there")
    return weight_files.read(file)


def _slots(file: Path, state: State, parameters: Mapping[str, Tensor]) -> dict[tuple[int, str, str], Tensor]:
    """The optimizer state in a file, by optimizer, parameter and slot: a number, or of the parameter's shape."""
    places = {}
    for name, shape in weight_files.read_shapes(file, 4 * len(parameters)).items():
        number, _, rest = name.partition(".")
        parameter, _, slot = rest.rpartition(".")
        if parameter not in parameters or number not in map(str, range(len(state.optimizers))):
            raise DataError(f"{file}: holds the state of other optimizers: {name[:200]}")
        if shape and shape != parameters[parameter].shape:
            raise DataError(f"{file}: holds another model: {name} is {weight_files.shown(shape)} there")
        places[name] = (int(number), parameter, slot)
    return {places[name]: value for name, value in weight_files.read(file).items()}


def spike_limit(norms: list[float], threshold: float) -> float:
    """`threshold` standard deviations above the gradient norms so far: beyond it, one is a spike. No limit after a
    short history."""
    if len(norms) < WINDOW // 4:
        return math.inf
    mean = math.fsum(norms) / len(norms)
    deviation = math.sqrt(math.fsum((n - mean) ** 2 for n in norms) / len(norms))
    return mean + threshold * deviation
