"""config.yaml of a run: what was chosen and why, what was asked, and what changed on the way.

Its top level is a recipe's, with `reasons`, `asked`, `changes` and the recipe's name beside, so that a run's file can
be trained again as a recipe. It is data: everything is read back from the sections; the comments beside values are for
people. One writer, `RunFile.write`; the changes of a run have no other place.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from gptworks.core import folder
from gptworks.core.config.recipe import BY_PROBLEM, Loader, build, overridden, pairs_of, problem_of, with_values
from gptworks.core.config.schema import Change, Chosen, Config, get, keys, keys_of_kind
from gptworks.core.errors import DataError

HEAD = "# Resolved by gptworks. 'asked' is what the recipe and the command line said; a comment is our reason."


@dataclass
class RunFile:
    """The configuration of a run, as its folder keeps it."""

    path: Path
    chosen: Chosen  # as the run began
    asked: Config
    reasons: dict[str, str] = field(default_factory=dict)  # by dotted key
    changes: list[Change] = field(default_factory=list)  # in the order of their steps
    recipe: str = ""  # its name, as it was given

    @classmethod
    def read(cls, path: Path) -> "RunFile":
        """Raises DataError for a file that is no run's."""
        folder.check_regular(path)
        try:
            tree = Loader(path.read_text(encoding="utf-8")).get_single_data()
            asked, reasons = tree.pop("asked") or {}, tree.pop("reasons", None) or {}
            recipe = str(tree.pop("recipe", None) or "")
            if "changes" in tree:
                tree["train"]["changes"] = tree.pop("changes")
            if not isinstance(reasons, dict) or not isinstance(asked, dict):
                raise TypeError("reasons and asked are mappings")
        except (OSError, ValueError, RecursionError, yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
            raise DataError(f"{path}: not a run's configuration ({error}); start over with --fresh") from error
        chosen = build(tree, str(path), Chosen)
        changes = list(chosen.train.changes)
        chosen = with_values(chosen, {"train.changes": []})
        told = {str(key): str(reason) for key, reason in reasons.items()}
        return cls(path, chosen, build(asked, f"{path}: asked"), reasons=told, changes=changes, recipe=recipe)

    def write(self) -> None:
        """Puts the file in place, whole or not at all. Raises StorageError."""
        folder.write_text(self.path, self.text())

    def append(self, change: Change) -> None:
        """Adds a change and writes it down."""
        self.changes.append(change)
        self.write()

    def at(self, step: int) -> Chosen:
        """The configuration that holds at a step: as begun, with the values of the changes before."""
        values: dict[str, Any] = {}
        for change in self.changes:
            if change.step <= step:
                values |= change.values
        return with_values(self.chosen, values) if values else self.chosen

    def text(self) -> str:
        """The file as it is written."""
        changes = [change.model_dump(mode="json", exclude_defaults=True) for change in self.changes]
        tree = shown_tree(self.chosen)
        del tree["train"]["changes"]
        lines = [HEAD, *_lines(tree, self.reasons, ""), "changes:" if changes else "changes: []"]
        lines += [f"  - {_scalar(change)}" for change in changes]
        if self.reasons:
            lines += ["reasons:", *(f"  {key}: {_scalar(reason)}" for key, reason in sorted(self.reasons.items()))]
        asked = self.asked.model_dump(mode="json", exclude_unset=True)
        lines += [f"recipe: {_scalar(self.recipe)}"] if self.recipe else []
        return "\n".join([*lines, *(_lines({"asked": asked}, {}, "") if asked else ["asked: {}"])]) + "\n"


def continued(run: Path, overrides: list[str] | dict[str, Any] | None = None) -> tuple[Config, str]:
    """Gives what continues a run: what was asked of it, with what is asked otherwise now, and the name of its recipe.
    Raises UsageError, DataError."""
    path = run / "config.yaml"
    if not path.is_file():
        raise DataError(
            f"{run}: no run to continue, as it has no config.yaml; the command that began it begins it again"
        )
    file = RunFile.read(path)
    tree = file.asked.model_dump(mode="json", exclude_unset=True)
    return overridden(tree, pairs_of(overrides), f"{path}: asked"), file.recipe


def shown_tree(config: Config) -> dict[str, Any]:
    """A configuration as nested values, without the sections that its problem does not use."""
    tree = config.model_dump(mode="json")
    used = problem_of(tree).sections
    return {name: section for name, section in tree.items() if name not in BY_PROBLEM or name in used}


def recipe_lines(config: Config, reasons: dict[str, str]) -> str:
    """A configuration as YAML, with the reason of each derived value as a comment: what a dry run prints."""
    return "\n".join(_lines(shown_tree(config), reasons, ""))


def differences(before: Config, now: Config, kind: str) -> list[tuple[str, Any, Any]]:
    """The keys of a kind in which what is asked now differs from what was asked before: (key, old, new)."""
    known = keys(type(before))  # another problem has other keys
    shared = [key for key in keys_of_kind(kind, type(now)) if key in known]
    pairs = [(key, get(before, key), get(now, key)) for key in shared]
    return [(key, was, is_now) for key, was, is_now in pairs if was != is_now]


def _lines(tree: dict[str, Any], reasons: dict[str, str], prefix: str) -> Iterator[str]:
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield f"{name}:"
            yield from (f"  {line}" for line in _lines(value, reasons, f"{prefix}{name}."))
        else:
            reason = reasons.get(prefix + name)
            yield f"{name}: {_scalar(value)}" + (f"  # {reason}" if reason else "")


def _scalar(value: Any) -> str:
    """One line of YAML. Text with anything unusual is quoted, so that line breaks of every kind are escaped."""
    if value is None or isinstance(value, bool | int):
        return json.dumps(value)  # which is YAML too, and takes a tenth of the time
    parts = value if isinstance(value, list) else [value]
    parts = [inner for part in parts for inner in (part.values() if isinstance(part, dict) else [part])]
    quote = '"' if any(isinstance(part, str) and not part.isprintable() for part in parts) else None
    text = yaml.safe_dump(value, default_flow_style=True, default_style=quote, allow_unicode=True, width=10**9)
    return text.strip().removesuffix("...").strip()
