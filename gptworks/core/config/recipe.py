"""Recipes: YAML and `key=value` overrides become one frozen, fully checked Config.

A recipe may extend another; a run's config.yaml is one too. Nothing is guessed in silence: an unknown key is an error
that names the nearest valid one, and a mistake is blamed on where it stands.
"""

import difflib
import os
import types
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic import ValidationError

from gptworks.core import folder
from gptworks.core.config.messages import explain, shown, told
from gptworks.core.config.schema import BESIDE_PATH, PROBLEMS, C, Chosen, Config, keys, with_problem
from gptworks.core.errors import UsageError
from gptworks.core.log import console
from gptworks.core.ranks import ranks
from gptworks.core.registry import resolve

# Short forms: `model=FOLDER` is what people type for `model.path=FOLDER`.
SHORT = {"model": "model.path", "adapter": "adapter.kind", "problem": "problem.kind"}
ASIDE = ("asked", "reasons", "changes", "recipe")  # what a run's config.yaml has that is no recipe's
# Of a run, what belongs to the machine that it was trained on; its time budget has become a number of steps.
OF_A_MACHINE = ("threads", "workers", "micro_batch", "precision", "compile")
BY_PROBLEM = ("data", "tokenizer", "generate")  # sections that a problem may not use


def recipe_names() -> list[str]:
    names = [entry.name for entry in (resources.files("gptworks") / "recipes").iterdir()]
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def recipe_text(recipe: str) -> str:
    """The YAML of a built-in recipe, or of a file."""
    if recipe in recipe_names():
        return (resources.files("gptworks") / "recipes" / f"{recipe}.yaml").read_text(encoding="utf-8")
    path = folder.path(recipe)
    if path.suffix not in (".yaml", ".yml"):
        if (path / "config.yaml").is_file():
            raise UsageError(
                f"{recipe} is a run: `gptworks continue {recipe}` goes on with it; {path / 'config.yaml'} is a recipe"
            )
        close = difflib.get_close_matches(recipe, recipe_names(), n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}?" if close else f"built in: {', '.join(recipe_names())}"
        raise UsageError(f"unknown recipe {recipe!r}: {hint} (or a .yaml file of your own)")
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(f"{path}: no such recipe file") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the path
        raise UsageError(f"{path}: cannot read the recipe: {error}") from error


def usual_folder(recipe: str) -> Path:
    """The run folder of a recipe for which none is named; that of a run's file is not the run's own."""
    path = Path(recipe)
    return Path("runs") / (f"{path.absolute().parent.name}-again" if path.name == "config.yaml" else path.stem)


Pairs = list[tuple[str, Any]]


def load(recipe: str | None, overrides: list[str] | dict[str, Any] | None = None) -> Config:
    """Reads a recipe and applies overrides, `["train.lr=3e-4", ...]` or `{"train.lr": 3e-4}`; raises UsageError.

    An overriding `model=FOLDER` takes the place of the recipe's model and tokenizer sections (what `BESIDE_PATH` names
    stays). Sections of the recipe that its problem does not use are dropped; overriding a key of theirs is an error.
    """
    origins: dict[str, str] = {}
    tree = {} if recipe is None else _tree(recipe, origins)
    return overridden(tree, pairs_of(overrides), where=recipe or "configuration", origins=origins)


def overridden(tree: dict[str, Any], pairs: Pairs, where: str, origins: dict[str, str] | None = None) -> Config:
    """The checked configuration of a nested mapping with overrides. `origins` has the file that each key stands in."""
    origins = origins or {}
    if dict(pairs).get("model.path") is not None:
        _make_room(tree)
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
        origins[key] = ""
    if pairs:
        origins[""] = f"{where}, with what overrides it"  # of what only several keys together are wrong in
    return build({name: part for name, part in tree.items() if name not in unused}, where, origins=origins)


def pairs_of(overrides: list[str] | dict[str, Any] | None) -> Pairs:
    """Overrides as dotted keys with their values."""
    pairs = list(overrides.items()) if isinstance(overrides, dict) else [_split(text) for text in overrides or []]
    return [(key if isinstance(value, dict) else SHORT.get(key, key), value) for key, value in pairs]


def _make_room(tree: dict[str, Any]) -> None:
    """Drops the shape and the tokenizer of a recipe, for a model that brings its own."""
    shape = tree.get("model")
    tree["model"] = {k: v for k, v in shape.items() if k in BESIDE_PATH} if isinstance(shape, dict) else {}
    tree.pop("tokenizer", None)


def _tree(recipe: str, origins: dict[str, str], above: tuple[str, ...] = ()) -> dict[str, Any]:
    """The sections of a recipe, over those of the one that it extends; notes in `origins` which key stands where.
    `above` are the recipes that extend this one."""
    tree = _parse(recipe_text(recipe), recipe)
    if tree is None:
        raise UsageError(f"{recipe}: nothing stands in it; `data: {{train: FILE}}` is a recipe, all else has defaults")
    if not isinstance(tree, dict):
        raise UsageError(f"{recipe}: a recipe is a YAML mapping of sections, not {type(tree).__name__}")
    if "asked" in tree:
        tree = _of_run(tree, recipe)
    base: dict[str, Any] = {}
    if (extended := tree.pop("extends", None)) is not None:
        if not isinstance(extended, str):
            raise UsageError(f"{recipe}: extends={shown(extended)}: name one recipe")
        if extended not in recipe_names() and Path(extended).suffix in (".yaml", ".yml"):
            extended = os.path.normpath(Path(recipe).parent / folder.path(extended))  # beside this file
        chain = (*above, recipe)
        if extended in (os.path.normpath(each) for each in chain):
            raise UsageError(f"{recipe}: extends {extended}, and so itself; name another recipe")
        try:
            base = _tree(extended, origins, chain)
        except UsageError as error:
            raise UsageError(str(error) if str(error).startswith(recipe) else f"{recipe}: extends: {error}") from None
    origins |= dict.fromkeys(_named(tree), recipe)
    if isinstance(model := tree.get("model"), dict) and model.get("path") is not None:
        _make_room(base)
    parts = [(name, section) for name, section in tree.items() if isinstance(section, dict)]
    _drop_prompts(base, {f"{name}.{key}": value for name, section in parts for key, value in section.items()})
    for name, section in tree.items():
        before = base.get(name)
        base[name] = before | section if isinstance(before, dict) and isinstance(section, dict) else section
    return base


def _named(tree: dict[str, Any]) -> list[str]:
    """The sections and dotted keys that a recipe names."""
    inner = [f"{name}.{key}" for name, part in tree.items() if isinstance(part, dict) for key in part]
    return [str(name) for name in tree] + inner


def _of_run(tree: dict[str, Any], path: str) -> dict[str, Any]:
    """A run's config.yaml as a recipe: the values that the run had, with its changes, except those that belong to a
    machine: of them what was asked stays, and the rest is chosen anew."""
    sections = {name: section for name, section in tree.items() if name not in ASIDE}
    asked, train = tree["asked"], sections.get("train")
    if isinstance(train, dict):
        spelled = asked["train"] if isinstance(asked, dict) and isinstance(asked.get("train"), dict) else {}
        kept = {key: value for key, value in train.items() if key not in (*OF_A_MACHINE, "time_budget_s")}
        kept |= {key: spelled[key] for key in OF_A_MACHINE if key in spelled}
        sections["train"] = kept | ({"changes": tree["changes"]} if tree.get("changes") else {})
        anew = [key for key in OF_A_MACHINE if key not in spelled]
        rest = f"; chosen anew for this machine: train.{', '.join(anew)}" if anew else ""
        if ranks.main:
            console.say(f"recipe   {path} is a run's: its values and steps are taken{rest}")
    return sections


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


def build(
    tree: dict[str, Any],
    where: str,
    kind: type[C] = Config,  # type: ignore[assignment]
    *,
    origins: dict[str, str] | None = None,
) -> C:
    """Validates a nested mapping; the mistakes are one line that names the keys and where each stands: in `where`, or
    as `origins` has it, where a key without a place was said on the command line."""
    if isinstance(tree.get("problem"), str):
        tree = {**tree, "problem": {"kind": tree["problem"]}}
    complete = with_problem(kind, problem_of(tree).Settings)
    try:
        return complete.model_validate(tree)
    except (ValidationError, RecursionError) as error:
        sections = [name for name in kind.model_fields if name not in ("stages", "license")]
        places: dict[str, list[str]] = {}
        for key, message in explain(error, keys(complete), sections):
            places.setdefault(_origin(key, where, origins or {}), []).append(message)
        lines = [f"{place}: {told(each)}" if place else told(each) for place, each in places.items()]
        raise UsageError("; ".join(lines)) from None


def _origin(key: str, where: str, origins: dict[str, str]) -> str:
    """The place of a key: its own, or that of what it is a part of."""
    while key not in origins and "." in key:
        key = key.rpartition(".")[0]
    return origins.get(key, where)


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
    kinds = [get_args(member)[0] if get_origin(member) is Annotated else member for member in _members(annotation)]
    return str in kinds
