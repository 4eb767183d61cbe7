"""Writes the table of configuration keys between the `keys` markers of docs/commands.md: python docs/keys.py"""

import re
import sys
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from gptworks.core.config import Section, keys

PAGE = Path(__file__).parent / "commands.md"
BLOCK = re.compile(r"(<!-- keys -->\n).*?(<!-- /keys -->)", re.DOTALL)
NAMES = {int: "whole number", float: "number", str: "text", bool: "true, false"}


def values(annotation: Any) -> str:
    """What a key takes, in words."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return values(inner[0])
    if origin is Literal:
        return ", ".join(map(str, inner))
    if origin in (Union, types.UnionType):
        return ", ".join(dict.fromkeys(values(member) for member in inner if member is not type(None)))
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return f"{{{', '.join(annotation.model_fields)}}}"
    if origin is list:
        return "list of text" if inner[0] is str else f"list of {values(inner[0])}"
    if origin is tuple:
        return f"{len(inner)} numbers"
    return NAMES[annotation]


def shown(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, (list, tuple)):
        return f"`[{', '.join(repr(v) if isinstance(v, str) and not v.isidentifier() else str(v) for v in value)}]`"
    return f"`{value}`"


def table() -> str:
    rows = ["| key | takes | default | on resume | meaning |", "|---|---|---|---|---|"]
    for key, field in keys().items():
        # Pydantic moves a lone Annotated's constraints into the field, so `annotation` is the plain type there.
        cells = [f"`{key}`", values(field.annotation), shown(field.default), field.json_schema_extra["resume"]]
        rows.append("| " + " | ".join([*cells, field.description]).replace("|w|", "abs(w)") + " |")
    return "\n".join(rows) + "\n"


def filled(page: str) -> str:
    """The page with today's table."""
    return BLOCK.sub(lambda match: match[1] + table() + match[2], page)


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"{PAGE}: {len(keys())} keys", file=sys.stderr)
