"""Names to things. Each kind has one table `name -> "module:attribute"`; `mine.py:Thing` works wherever a name does."""

import contextlib
import difflib
import importlib
import importlib.util
import traceback
from collections.abc import Mapping
from functools import cache
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

from gptworks.core import folder
from gptworks.core.errors import GptworksError, UsageError


def nearest(name: str, known: list[str]) -> str:
    """A sentence that points at the valid name closest to `name`, or lists the valid ones."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known))}"


def file_of(name: str) -> Path | None:
    """The file of the user's own that `path/to/mine.py:Thing` names; None for a name of a table."""
    path, _, _ = name.rpartition(":")
    return folder.path(path) if path.endswith(".py") else None


def resolve(kind: str, table: dict[str, str], name: str) -> Any:
    """The object `name` stands for: a row of `table`, or `path/to/mine.py:Thing` of the user's own.

    Raises UsageError, also for whatever the user's file raises when it is loaded.
    """
    if name in table:
        module, _, attribute = table[name].partition(":")
        return getattr(importlib.import_module(module), attribute)
    path, attribute = file_of(name), name.rpartition(":")[2]
    if path is None:
        raise UsageError(f"unknown {kind} {name!r}: {nearest(name, list(table))} (or your own: file.py:Name)")
    if not path.is_file():
        place = "" if path.is_absolute() else f" in {Path.cwd()}"
        raise UsageError(f"{kind} {name!r}: no such file: {path}{place}")
    try:
        module_object = _load(str(path.resolve()), path.stat().st_mtime_ns, kind)
    except GptworksError:  # a signal to stop, for one
        raise
    except (Exception, SystemExit) as error:
        problem = f"{type(error).__name__}: {text_of(error)}"
        raise UsageError(f"{kind} {name!r}: {path} cannot be loaded: {problem} (--debug shows where)") from error
    if not hasattr(module_object, attribute):
        raise UsageError(f"{kind} {name!r}: {path} defines no {attribute!r}")
    return getattr(module_object, attribute)


class _Uncached(SourceFileLoader):
    """Reads the source each time and leaves no __pycache__, which tells an edit by its second and its size alone."""

    def path_stats(self, path: str) -> Mapping[str, Any]:
        raise OSError("not to be cached")  # which is how a loader says so


@cache
def _load(path: str, changed: int, kind: str) -> ModuleType:
    """The module of a user's file as it is since it was `changed`; loaded once, so that its classes stay the same."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, path, loader=_Uncached(Path(path).stem, path))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    _users_files[path] = kind
    with contextlib.chdir(Path.cwd()):  # wherever the file goes: other names of the configuration are relative too
        spec.loader.exec_module(module)
    return module


_users_files: dict[str, str] = {}  # path -> what it was named as: problem, data source, ...


def class_of(thing: object) -> str:
    """The class of an object, or a class itself, as a person knows it: `mine.py:Task` where a user's file has it."""
    kind = thing if isinstance(thing, type) else type(thing)
    own = [Path(path).name for path in _users_files if Path(path).stem == kind.__module__]
    return f"{own[0]}:{kind.__name__}" if own else kind.__name__


def users_problems() -> list[str]:
    """The files in which problems of the user's own are."""
    return [path for path, kind in _users_files.items() if kind == "problem"]


def text_of(error: BaseException) -> str:
    """The text of an error, even of one whose class is a user's own and fails at telling it."""
    try:
        return str(error)
    except Exception:
        return "(it cannot be printed)"


def users_place(error: BaseException) -> str | None:
    """The place in a user's own file where an error arose, as `mine.py, line 12, in take`; None for an error
    elsewhere."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if str(Path(frame.filename).resolve()) in _users_files]
    return f"{own[-1].filename}, line {own[-1].lineno}, in {own[-1].name}" if own else None
