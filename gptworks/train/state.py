"""The state of a run and its checkpoints.

A checkpoint is a new directory with safetensors, JSON and a hashed manifest, put in place by one rename; two are kept
and a reader takes the newest that verifies. There is no random state to store: every draw of a step is a function of
(seed, step, micro-batch) (`runtime.seed_everything`), and the loader's place is two integers.
"""

import hashlib
import json
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gptworks.core import folder
from gptworks.core.errors import DataError, NotFinite
from gptworks.core.log import console
from gptworks.data.loader import Cursor
from gptworks.model.transformer import Transformer

KEPT = 2
NAME = re.compile(r"^step-(\d{8})$")


@dataclass
class State:
    """Everything the next step depends on."""

    model: Transformer
    optimizers: list[torch.optim.Optimizer]
    step: int = 0  # optimizer steps done
    tokens: int = 0  # targets trained on
    cursor: Cursor = field(default_factory=Cursor)
    best_loss: float | None = None  # lowest evaluation loss so far
    evals_since_best: int = 0
    replans: list[list[int]] = field(default_factory=list)  # [step, new length]: what a time budget decided on the way
    seconds: float = 0.0  # of training, over all of the run's processes
    stopped: str | None = None  # why the run ended, once it has

    def length(self, planned: int) -> int:
        """Steps in the run: as planned, or as a time budget last decided."""
        return self.replans[-1][1] if self.replans else planned

    def due(self, every: int, planned: int) -> bool:
        """Whether this step is one in `every`, stretched with the run's length, or the last."""
        length = self.length(planned)
        return self.step % -(-every * length // planned) == 0 or self.step == length

    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Weights by name, and optimizer state by `<optimizer>.<parameter>.<slot>`."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        weights = {name: p.detach() for name, p in self.model.named_parameters()}
        slots = {}
        for number, optimizer in enumerate(self.optimizers):
            for parameter, values in optimizer.state.items():
                for slot, value in values.items():
                    slots[f"{number}.{names[id(parameter)]}.{slot}"] = value
        return weights, slots

    def counters(self) -> dict[str, Any]:
        keys = ("step", "tokens", "best_loss", "evals_since_best", "replans", "seconds", "stopped")
        return {key: getattr(self, key) for key in keys} | {"cursor": asdict(self.cursor)}

    def fingerprint(self) -> str:
        """SHA-256 over every bit that decides the next step: weights, optimizer state, counters (not the clock)."""
        digest = hashlib.sha256()
        for group in self.tensors():
            for name in sorted(group):
                digest.update(name.encode())
                digest.update(_bits(group[name]))
        counters = {key: value for key, value in self.counters().items() if key not in ("seconds", "stopped")}
        digest.update(json.dumps(counters, sort_keys=True).encode())
        return digest.hexdigest()

    def difference(self, other: "State") -> str | None:
        """None if the two are identical to the bit, else the first thing that differs."""
        for kind, ours, theirs in zip(("weight", "optimizer state"), self.tensors(), other.tensors(), strict=True):
            if ours.keys() != theirs.keys():
                return f"{kind} {sorted(ours.keys() ^ theirs.keys())[0]} is in only one of them"
            for name, value in ours.items():
                if _bits(value) != _bits(theirs[name]):
                    most = float((value.cpu().double() - theirs[name].cpu().double()).abs().max())
                    return f"{kind} {name} differs by up to {most:.3g}"
        mine, yours = self.counters(), other.counters()
        for key in ("step", "tokens", "cursor", "best_loss", "evals_since_best", "replans"):
            if mine[key] != yours[key]:
                return f"{key} is {mine[key]} and {yours[key]}"
        return None


def _bits(value: Tensor) -> bytes:
    return value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def save(state: State, checkpoints: Path, facts: dict[str, Any]) -> Path:
    """Writes `checkpoints/step-N`, then removes all but the newest two. Raises NotFinite, StorageError.

    `facts` (data identity, threads, versions) are kept beside the counters and checked by who reads them.
    """
    path = checkpoints / f"step-{state.step:08d}"
    if path.is_dir() and _is_good(path):
        return path
    weights, slots = state.tensors()
    for name, value in (weights | slots).items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise NotFinite(
                f"{name} is not finite at step {state.step}; nothing was written, the last checkpoint stands"
            )
    with folder.commit(path) as aside:
        save_file({n: v.cpu().contiguous() for n, v in weights.items()}, aside / "model.safetensors")
        save_file({n: v.cpu().contiguous() for n, v in slots.items()}, aside / "optimizer.safetensors")
        (aside / "state.json").write_text(json.dumps({**state.counters(), **facts}, indent=2) + "\n")
    for old in listing(checkpoints)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return path


def _is_good(path: Path) -> bool:
    try:
        folder.verify(path)
    except DataError:
        shutil.rmtree(path, ignore_errors=True)
        return False
    return True


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
    try:
        weights = load_file(path / "model.safetensors")
        slots = load_file(path / "optimizer.safetensors")
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path}: {error}") from None
    facts = folder.read_json(path / "state.json")
    parameters = dict(state.model.named_parameters())
    if weights.keys() != parameters.keys():
        raise DataError(f"{path}: holds another model: {sorted(weights.keys() ^ parameters.keys())[0]}")
    for name, value in weights.items():
        if value.shape != parameters[name].shape:
            raise DataError(f"{path}: holds another model: {name} is {list(value.shape)} there")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    for name, value in slots.items():
        number, rest = name.split(".", 1)
        parameter_name, slot = rest.rsplit(".", 1)
        parameter = parameters[parameter_name]
        place = (
            torch.device("cpu") if value.ndim == 0 and slot == "step" and not parameter.is_cuda else parameter.device
        )
        state.optimizers[int(number)].state[parameter][slot] = value.clone().to(place)
    for key in ("step", "tokens", "best_loss", "evals_since_best", "replans", "seconds", "stopped"):
        setattr(state, key, facts[key])
    state.cursor = Cursor(**facts["cursor"])
    return facts
