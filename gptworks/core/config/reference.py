"""What a person looks up about configuration keys: an overview on one screen, or some keys with all that is known."""

import fnmatch
import shutil
import textwrap
from typing import Any

from gptworks.core.config.messages import takes_of, unknown
from gptworks.core.config.schema import keys
from gptworks.core.errors import UsageError

RESUME = {"fixed": "a run keeps it", "flexible": "a run may be continued with another", "free": "may differ any time"}


def matching(pattern: str | None) -> list[str]:
    """The keys that a pattern means: itself, a section, a glob, a part of the name, else a word of the meaning. Raises
    UsageError where there is none."""
    known = keys()
    if pattern is None or pattern in known:
        return [pattern] if pattern else list(known)
    word = pattern.lower().rstrip(".")
    chosen = [key for key in known if key.startswith(f"{word}.") or fnmatch.fnmatch(key, word)]
    chosen = chosen or [key for key in known if word in key.lower()]
    chosen = chosen or [key for key, field in known.items() if word in field.description.lower()]
    if not chosen:
        raise UsageError(unknown(pattern, list(known), []).removesuffix(": `gptworks keys` lists them"))
    return chosen


def described(key: str) -> dict[str, Any]:
    """Tells what is known of a key, as `--json` prints it."""
    field = keys()[key]
    return {
        "takes": takes_of(field),
        "default": field.default,
        "resume": field.json_schema_extra["resume"],
        "meaning": field.description,
    }


def overview() -> str:
    """All keys by section, on one screen."""
    sections: dict[str, list[str]] = {}
    for key in keys():
        section, _, name = key.rpartition(".")
        sections.setdefault(section, []).append(name)
    lines = [_wrapped(f"{section:<11}", " ".join(names)) for section, names in sections.items()]
    return "\n".join([*lines, "", "Tell me more: gptworks keys train.lr, gptworks keys data, gptworks keys lr", ""])


def details(chosen: list[str]) -> str:
    """Keys with what they take, their default and their meaning."""
    lines = []
    for key in chosen:
        known = described(key)
        default = "left open" if known["default"] is None else _shown(known["default"])
        lines += [f"{key} = {default}", _wrapped(" " * 4, known["meaning"])]
        lines.append(_wrapped(" " * 4, f"({known['takes']}; {RESUME[known['resume']]})"))
    return "\n".join([*lines, ""])


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, list | tuple) and value else str(value)


def _wrapped(head: str, text: str) -> str:
    width = min(shutil.get_terminal_size().columns, 100)
    return textwrap.fill(text, max(width, 40), initial_indent=head, subsequent_indent=" " * len(head))
