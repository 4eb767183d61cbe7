"""What a checkpoint keeps of its run, its values and where it came from, and whether these still hold."""

from functools import reduce
from pathlib import Path
from typing import Any

from gptworks.core import config as configuration
from gptworks.core import folder, runtime
from gptworks.core.config import RunFile
from gptworks.core.errors import DataError, RunMismatch
from gptworks.core.registry import file_of
from gptworks.model import hub
from gptworks.training.assemble import Run

# Places of what is known by its content: it may lie elsewhere now.
BY_CONTENT = ("model.path", "tokenizer.path", "data.shards")


def values_of(file: RunFile) -> dict[str, Any]:
    """The part of a run's file that its training follows from, for its checkpoints."""
    kind = type(file.asked)
    names = configuration.keys_of_kind("fixed", kind) + configuration.keys_of_kind("flexible", kind)
    tree = file.chosen.model_dump(mode="json")
    values = {name: reduce(dict.__getitem__, name.split("."), tree) for name in names if name not in BY_CONTENT}
    return {"values": values, "changes": [change.model_dump(mode="json") for change in file.changes]}


def check_unedited(file: RunFile, checkpoint: Path) -> None:
    """Raises RunMismatch where config.yaml has other values than when a checkpoint was written."""
    facts = folder.read_json(checkpoint / "state.json")
    if not isinstance(facts, dict) or "config" not in facts:
        return  # of an earlier version
    now = values_of(file)
    try:
        values, changes = dict(facts["config"]["values"]), list(facts["config"]["changes"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{checkpoint}: not a checkpoint of this version: config: {error}") from None
    kept = {key: value for key, value in now["values"].items() if key in values}
    other = [f"{key}={value}, was {values[key]}" for key, value in kept.items() if value != values[key]]
    later = now["changes"][len(changes) :]  # made since, from where the run stood
    if now["changes"][: len(changes)] != changes or any(change["step"] < facts["step"] for change in later):
        other.append("changes")
    if other:
        raise RunMismatch(
            f"{file.path} was edited since {checkpoint.name} was trained with it: {'; '.join(other)}; put it back, or "
            "use --fresh; flexible keys are changed by the command"
        )


def check_agreement(run: Run, facts: dict[str, Any]) -> None:
    """Raises RunMismatch unless data and frozen models are those that a checkpoint's run began with."""
    if run.problem.identity != facts.get("data"):
        raise RunMismatch("the training text is not the one this run began with; --fresh starts over")
    saved = facts.get("parents")
    before = saved if isinstance(saved, dict) else {"base": facts["base"]} if "base" in facts else {}
    now = _frozen_parents(run)
    for role in sorted(before.keys() | now.keys()):
        if before.get(role) != now.get(role):
            paths = [parent.path for parent in run.problem.parents if parent.role == role]
            name = hub.name_of(run.base.home) if role == "base" and run.base else "".join(paths) or role
            raise RunMismatch(f"{name} has other weights than when this run began; put the old ones back")
    kind = run.config.problem.kind
    if facts.get("problem", _own_file(kind)) != _own_file(kind):  # a checkpoint of before has none
        raise RunMismatch(f"{kind}: the file has changed since this run began; put the old one back, or use --fresh")


def facts_of(run: Run) -> dict[str, Any]:
    """The part of it that does not change in training."""
    return {
        "data": run.problem.identity, "threads": run.config.train.threads, "versions": runtime.versions(),
        "parents": _frozen_parents(run), "problem": _own_file(run.config.problem.kind),
    }  # fmt: skip


def _own_file(kind: str) -> str | None:
    """SHA-256 of the file that a problem of the user's own is in."""
    file = file_of(kind)
    return folder.sha256(file) if file else None


def _frozen_parents(run: Run) -> dict[str, str]:
    """SHA-256 by role of the models that are in no checkpoint."""
    parents = {parent.role: parent.sha256 for parent in run.problem.parents}
    if run.base and run.config.adapter.kind:
        parents["base"] = run.base.weights_sha256
    return parents
