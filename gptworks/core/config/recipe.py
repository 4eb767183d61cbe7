"""Recipes: YAML and `key=value` overrides become one frozen, fully checked Config.

Nothing is guessed in silence: an unknown key is an error that names the nearest valid one.
"""

import difflib
import types
from importlib import resources
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import yaml
from pydantic import ValidationError

from gptworks.core.config.messages import explain, shown
from gptworks.core.config.schema import BESIDE_PATH, PROBLEMS, C, Chosen, Config, keys, with_problem
from gptworks.core.errors import UsageError
from gptworks.core.registry import resolve

# Short forms: `model=FOLDER` is what people type for `model.path=FOLDER`.
SHORT = {"model": "model.path", "adapter": "adapter.kind", "problem": "problem.kind"}
ASIDE = ("asked", "reasons", "changes")  # sections of a run's config.yaml that are no recipe's
BY_PROBLEM = ("data", "tokenizer", "generate")  # sections that a problem may not use


def recipe_names() -> list[str]:
    folder = resources.files("gptworks") / "recipes"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def recipe_text(recipe: str) -> str:
    """The YAML of a built-in recipe, or of a file."""
    if recipe in recipe_names():
        return (resources.files("gptworks") / "recipes" / f"{recipe}.yaml").read_text(encoding="utf-8")
    path = Path(recipe)
    if path.suffix not in (".yaml", ".yml"):
        close = difflib.get_close_matches(recipe, recipe_names(), n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}?" if close else f"built in: {', '.join(recipe_names())}"
        raise UsageError(f"unknown recipe {recipe!r}: {hint} (or a .yaml file of your own)")
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(f"{path}: no such recipe file") from None
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a NUL byte in the path
        raise UsageError(f"{path}: cannot read the recipe: {error}") from error


def load(recipe: str | None, overrides: list[str] | dict[str, Any] | None = None) -> Config:
    """Reads a recipe and applies overrides, `["train.lr=3e-4", ...]` or `{"train.lr": 3e-4}`; raises UsageError.

    An overriding `model=FOLDER` takes the place of the recipe's model and tokenizer sections (what `BESIDE_PATH` names
    stays). Sections of the recipe that its problem does not use are dropped; overriding a key of theirs is an error.
    """
    tree = (_parse(recipe_text(recipe), recipe) or {}) if recipe else {}
    if not isinstance(tree, dict):
        raise UsageError(f"{recipe}: a recipe is a YAML mapping of sections, not {type(tree).__name__}")
    tree = {name: section for name, section in tree.items() if name not in ASIDE}
    pairs = list(overrides.items()) if isinstance(overrides, dict) else [_split(text) for text in overrides or []]
    pairs = [(SHORT.get(key, key), value) for key, value in pairs]
    if dict(pairs).get("model.path") is not None:
        shape = tree.get("model")
        tree["model"] = {k: v for k, v in shape.items() if k in BESIDE_PATH} if isinstance(shape, dict) else {}
        tree.pop("tokenizer", None)
    for key, value in pairs:  # first, since it says what other keys there are
        if key == "problem.kind":
            _assign(tree, key, value=value, kind=Config)
    _drop_prompts(tree, dict(pairs))
    problem = problem_of(tree)
    unused = [name for name in BY_PROBLEM if name not in problem.sections]
    for key, value in pairs:
        if (section := key.partition(".")[0]) in unused:
            raise UsageError(f"{key}: {problem.__name__} does not use the section {section!r}; leave the key out")
        _assign(tree, key, value=value, kind=with_problem(Config, problem.Settings))
    return build({name: section for name, section in tree.items() if name not in unused}, recipe or "configuration")


def _drop_prompts(tree: dict[str, Any], overrides: dict[str, Any]) -> None:
    """A recipe's prompts are of its text and its tokenizer: beside others they are left open."""
    given_data, data, prompts = overrides.get("data"), tree.get("data"), tree.get("generate")
    text = overrides.get("data.train", given_data.get("train") if isinstance(given_data, dict) else None)
    other_text = text is not None and (not isinstance(data, dict) or data.get("train") != text)
    other_ids = any(overrides.get(key) is not None for key in ("model.path", "tokenizer.path"))
    if (other_text or other_ids) and isinstance(prompts, dict):
        tree["generate"] = {key: value for key, value in prompts.items() if key != "prompts"}


def problem_of(tree: dict[str, Any]) -> Any:
    """The class of the problem that a configuration names (`training/problem.py`). Raises UsageError."""
    section = tree.get("problem")
    kind = section.get("kind", "pretraining") if isinstance(section, dict) else section or "pretraining"
    if not isinstance(kind, str):
        raise UsageError(f"problem.kind={shown(kind)}: name a problem, or file.py:Name")
    problem = resolve("problem", PROBLEMS, kind)
    lacking = [
        name for name in ("Settings", "sections", "check", "prepare", "open", "start") if not hasattr(problem, name)
    ]
    lacking += getattr(problem, "__abstractmethods__", ())
    if lacking or not isinstance(problem, type):
        raise UsageError(
            f"problem {kind!r}: has no {lacking[0] if lacking else 'class'}; see gptworks/training/problem.py"
        )
    return problem


def build(tree: dict[str, Any], where: str, kind: type[C] = Config) -> C:  # type: ignore[assignment]
    """Validates a nested mapping; every error is one line that names the key."""
    if isinstance(tree.get("problem"), str):
        tree = {**tree, "problem": {"kind": tree["problem"]}}
    complete = with_problem(kind, problem_of(tree).Settings)
    try:
        return complete.model_validate(tree)
    except (ValidationError, RecursionError) as error:
        sections = [name for name in kind.model_fields if name not in ("stages", "license")]
        raise UsageError(f"{where}: {explain(error, list(keys(complete)), sections)}") from None


def with_values(config: C, values: dict[str, Any]) -> C:
    """A copy of a configuration with dotted keys set; the result is checked again."""
    tree = config.model_dump(mode="json", exclude_unset=True)
    for key, value in values.items():
        _assign(tree, key, value=value, kind=type(config))
    kind: Any = Chosen if isinstance(config, Chosen) else Config
    built: C = build(tree, "derived configuration", kind)
    return built


class Loader(yaml.SafeLoader):
    """Refuses a mapping that has a key twice, of which YAML keeps the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value[:80]!r} is there twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return node


def _parse(text: str, where: str | None) -> Any:
    try:
        return Loader(text).get_single_data()
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        problem = " ".join(str(error).split())
        raise UsageError(f"{where}: not valid YAML: {problem[:300]}") from None


def _split(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise UsageError(f"{text!r}: an override is key=value, for example train.max_steps=100")
    if value == "":
        return key, ""
    return key, _parse(value, key) if value[0] in "[{" or value in ("null", "true", "false") else value


def _assign(tree: dict[str, Any], key: str, value: Any, kind: type[Config]) -> None:
    *path, last = key.split(".")
    node = tree
    for name in path:
        child = node.setdefault(name, {})
        if name == path[0] == "problem" and isinstance(child, str):
            child = node[name] = {"kind": child}
        if child is None:
            child = node[name] = {}
        if not isinstance(child, dict):
            raise UsageError(f"{key}: {name} is a value, not a section")
        node = child
    field = keys(kind).get(key)
    if field is None and isinstance(value, dict) and isinstance(node.get(last, {}), dict):  # a section
        for name, inner in value.items():
            _assign(tree, f"{key}.{name}", value=inner, kind=kind)
        return
    if (
        isinstance(value, str)
        and field is not None
        and _takes_list(field.annotation)
        and not _takes_text(field.annotation)
    ):
        parts = [value] if key == "generate.prompts" else value.split(",")  # a prompt may have commas
        value = [part for part in parts if part]
    node[last] = value


def _members(annotation: Any) -> list[Any]:
    return list(get_args(annotation)) if get_origin(annotation) in (Union, types.UnionType) else [annotation]


def _takes_list(annotation: Any) -> bool:
    return any(get_origin(member) in (list, tuple) for member in _members(annotation))


def _takes_text(annotation: Any) -> bool:
    return any(member is str for member in _members(annotation))
