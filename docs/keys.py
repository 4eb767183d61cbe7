"""Writes the table of configuration keys between the `keys` markers of docs/commands.md: python docs/keys.py"""

import re
import sys
from pathlib import Path
from typing import Any

from gptworks.core.config import keys
from gptworks.core.config.messages import takes

PAGE = Path(__file__).parent / "commands.md"
BLOCK = re.compile(r"(<!-- keys -->\n).*?(<!-- /keys -->)", re.DOTALL)


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
        cells = [f"`{key}`", takes(field.annotation), shown(field.default), field.json_schema_extra["resume"]]
        rows.append("| " + " | ".join([*cells, field.description]).replace("|w|", "abs(w)") + " |")
    return "\n".join(rows) + "\n"


def filled(page: str) -> str:
    """The page with today's table."""
    return BLOCK.sub(lambda match: match[1] + table() + match[2], page)


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"{PAGE}: {len(keys())} keys", file=sys.stderr)
