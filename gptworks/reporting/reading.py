"""The content of a run folder as the page takes it: whatever is there, whatever state it is in."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from gptworks.core import config as configuration
from gptworks.core import folder
from gptworks.core.errors import DataError, UsageError


@dataclass
class Run:
    """The content of a run folder so far; empty for a file that is not there."""

    name: str
    config: dict[str, Any]  # dotted key -> value; so is `asked`
    asked: dict[str, Any]
    reasons: dict[str, str]
    changes: list[dict[str, Any]]  # on the way
    rows: list[dict[str, Any]]  # of metrics.jsonl; `step` is a number
    result: dict[str, Any]
    account: dict[str, Any]  # run.json: the recipe, and where the time went
    passage: dict[str, Any]  # held-out text with the losses of its tokens
    choices: dict[str, Any]  # what the run was decided from
    data: dict[str, Any]
    lineage: dict[str, Any]
    weights: dict[str, Any]
    problems: list[str]

    @property
    def step(self) -> float:
        return max((row["step"] for row in self.rows), default=0)

    @property
    def recipe(self) -> str:
        """The recipe's name, or the path of its file; "" where that is not known."""
        known = (self.result.get("recipe"), self.account.get("recipe"), self.lineage.get("recipe"))
        return next((str(name) for name in known if name), "")

    def series(self, tag: str) -> list[tuple[float, float]]:
        points = [(row["step"], number(row.get(tag))) for row in self.rows]
        return sorted((step, value) for step, value in points if value is not None)

    def last(self, tag: str) -> float | None:
        return next((value for _, value in reversed(self.series(tag))), None)

    def before(self, tag: str) -> float | None:
        """The value of step 0: of the model that the run started from."""
        return next((value for step, value in self.series(tag) if step == 0), None)

    def asked_by_recipe(self) -> dict[str, Any] | None:
        """The keys that the recipe itself asks for, where it is one of the built-in; None where that is not known."""
        try:
            if self.recipe not in configuration.recipe_names():
                return None
            return flatten(configuration.load(self.recipe).model_dump(mode="json", exclude_unset=True))
        except UsageError:
            return None


def read_run(run: Path) -> Run:
    """Reads what is there. A file that cannot be read is empty, and named in `problems`."""
    problems: list[str] = []

    def load(path: Path, parse: Callable[[str], Any] = json.loads, errors: str = "strict") -> dict[str, Any]:
        try:
            folder.check_regular(path)
            tree = parse(path.read_text(encoding="utf-8", errors=errors))
            if not isinstance(tree, dict):
                raise ValueError("not a mapping")
        except FileNotFoundError:
            return {}
        except (DataError, OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            problems.append(f"{path.name} cannot be read: {' '.join(str(error).split())[:200]}")
            return {}
        return tree

    config = load(run / "config.yaml", read_config)
    values = config.get("values", {})
    return Run(
        name=run.resolve().name,
        config=values,
        asked=config.get("asked", {}),
        reasons=config.get("reasons", {}),
        changes=config.get("changes", []),
        rows=load(run / "metrics.jsonl", read_rows, errors="replace").get("rows", []),
        result=load(run / "result.json"),
        account=load(run / "run.json"),
        passage=load(run / "passage.json"),
        choices=load(run / "choices.json"),
        data=load(Path(str(values.get("data.shards") or run / "data")) / folder.MANIFEST),
        lineage=load(run / "model" / "gptworks.json"),
        weights=load(run / "model" / folder.MANIFEST),
        problems=problems,
    )


def read_rows(text: str) -> dict[str, Any]:
    rows = []
    for line in text.split("\n"):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue  # a line that is being written
        if isinstance(row, dict) and number(row.get("step")) is not None:
            rows.append(row)
    return {"rows": rows}


def read_config(text: str) -> dict[str, Any]:
    """The values of config.yaml, what was asked, and the reason of each value, all by dotted key; and the changes."""
    tree = yaml.safe_load(text)
    if not isinstance(tree, dict):
        raise ValueError("not a mapping")
    asked, reasons = flatten(tree.pop("asked", None)), tree.pop("reasons", None)
    changes = listed(tree.pop("changes", None))
    reasons = {str(key): str(why) for key, why in reasons.items()} if isinstance(reasons, dict) else {}
    return {"values": flatten(tree), "asked": asked, "reasons": reasons, "changes": changes}


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items() if isinstance(tree, dict) else ():
        deeper = isinstance(value, dict) and value
        flat |= flatten(value, f"{prefix}{name}.") if deeper else {f"{prefix}{name}": value}
    return flat


def get(tree: Any, *names: str) -> Any:
    """tree[a][b]..., or None where a step is missing."""
    for name in names:
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree


def listed(tree: Any) -> list[dict[str, Any]]:
    """The entries of a list that are mappings; none of anything else."""
    return [one for one in tree if isinstance(one, dict)] if isinstance(tree, list) else []


def mappings(tree: Any) -> list[tuple[str, dict[str, Any]]]:
    """The entries of a mapping that are mappings; none of anything else."""
    return [(str(name), one) for name, one in tree.items() if isinstance(one, dict)] if isinstance(tree, dict) else []


def number(value: Any) -> float | None:
    """A number that can be drawn, or None: a log may hold null, NaN or text where a value was expected."""
    try:
        usable = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(float(value)) < 1e300
    except OverflowError:
        return None
    return float(value) if usable else None
