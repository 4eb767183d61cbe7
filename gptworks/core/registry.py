"""Names to things. Each kind has one table `name -> "module:attribute"`; `mine.py:Thing` works wherever a name does."""

import difflib
import importlib
import importlib.util
from pathlib import Path
from typing import Any

from gptworks.core.errors import GptworksError, UsageError


def nearest(name: str, known: list[str]) -> str:
    """A sentence that points at the valid name closest to `name`, or lists the valid ones."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known))}"


def resolve(kind: str, table: dict[str, str], name: str) -> Any:
    """The object `name` stands for: a row of `table`, or `path/to/mine.py:Thing` of the user's own.

    Raises UsageError, also for whatever the user's file raises when it is loaded.
    """
    if name in table:
        module, _, attribute = table[name].partition(":")
        return getattr(importlib.import_module(module), attribute)
    path, _, attribute = name.rpartition(":")
    if not path.endswith(".py"):
        raise UsageError(f"unknown {kind} {name!r}: {nearest(name, list(table))} (or your own: file.py:Name)")
    if not Path(path).is_file():
        raise UsageError(f"{kind} {name!r}: no such file: {path}")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec and spec.loader
    module_object = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module_object)
    except GptworksError:  # a signal to stop, for one
        raise
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
        raise UsageError(f"{kind} {name!r}: {path} cannot be loaded: {problem} (--debug shows where)") from error
    if not hasattr(module_object, attribute):
        raise UsageError(f"{kind} {name!r}: {path} defines no {attribute!r}")
    return getattr(module_object, attribute)
