"""Values as markup: everything that is not markup already is escaped on its way into the page."""

import base64
import hashlib
import html
import json
import re
from collections.abc import Callable, Iterable
from importlib import resources
from typing import Any

from gptworks.reporting.reading import number

CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
# Letters that tell a language apart, so that a browser takes its fonts and breaks its lines. Kana before Han.
LETTERS = (("ja", r"[\u3040-\u30ff]"), ("ko", r"[\uac00-\ud7af]"), ("zh", r"[\u3400-\u9fff\uf900-\ufaff]"))
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">
<title>{title} · gptworks</title>
<style>{style}</style></head>
<body><main>
{body}
</main><script>{script}</script></body></html>
"""


class Html(str):
    """Text that is markup already; everything else is escaped on its way into the page."""


def page(title: Any, body: str) -> str:
    """A whole page. The one script that a browser runs is ours, which it knows by its hash."""
    files = resources.files("gptworks.reporting")
    style, script = ((files / name).read_text(encoding="utf-8") for name in ("style.css", "hover.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return PAGE.format(title=h(title), policy=policy, style=style, script=script, body=body)


def h(value: Any) -> Html:
    """Any value as markup: escaped, control characters and lone surrogates replaced."""
    if isinstance(value, Html):
        return value
    return Html(html.escape(clean(str(value))))


def clean(text: str) -> str:
    """A text without control characters and lone surrogates."""
    return CONTROL.sub("\ufffd", text.encode("utf-8", "replace").decode("utf-8"))


def language(text: str) -> str:
    """The attribute that says in which language a text is, where its letters tell: they may be few among others."""
    start = text[:2000]
    letters = sum(map(str.isalpha, start))
    found_in = (name for name, of in LETTERS if len(re.findall(of, start)) > (0.1 if name == "ja" else 0.3) * letters)
    name = next(found_in, None) if letters else None
    return f' lang="{name}"' if name else ""


def code(value: Any) -> Html:
    """A value as config.yaml spells it, in fixed width."""
    plain = isinstance(value, str) and value.isprintable() and value
    return Html(f"<code>{h(value if plain else json.dumps(value, ensure_ascii=False, default=str))}</code>")


def show(value: Any, form: str | Callable[[float], str]) -> str | None:
    """A number by a format string or a function; None if it is no number."""
    value_shown = number(value)
    if value_shown is None:
        return None
    return form.format(value_shown) if isinstance(form, str) else form(value_shown)


def sentence(text: str) -> str:
    return f"<p>{h(text[:1].upper() + text[1:])}.</p>" if text else ""


def joined(by: str, *parts: str | None) -> str:
    return by.join(part for part in parts if part)


def section(name: str, *parts: str) -> str:
    body = "".join(parts)
    return f"<section><h2>{h(name)}</h2>{body}</section>" if body else ""


def folded(summary: str, *parts: str) -> str:
    body = "".join(parts)
    return f"<details><summary>{h(summary)}</summary>{body}</details>" if body else ""


def table(style: str, rows: Iterable[tuple[Any, ...]], *head: str) -> str:
    """Rows whose second cell, the value, is None are left out; so is a table without rows. The first cell names the
    row. Where a page is narrow, each cell can be told by the name of its column."""
    kept = [row for row in rows if row[1] is not None]
    names = [*head, *[""] * 20]

    def cells(row: tuple[Any, ...]) -> str:
        first, *others = (h("–" if cell is None else cell) for cell in row)
        told = (f' data-label="{h(name)}"' if name else "" for name in names[1:])
        tag = 'th scope="row"' if head else "td"
        rest = "".join(f"<td{name}>{cell}</td>" for name, cell in zip(told, others, strict=False))
        return f"<{tag}>{first}</{tag.split(' ')[0]}>{rest}"

    top = "".join(f'<th scope="col">{h(name)}</th>' if name else "<td></td>" for name in head)
    top = f"<thead><tr>{top}</tr></thead>" if head else ""
    body = "".join(f"<tr>{cells(row)}</tr>" for row in kept)
    return f'<table class="{style}">{top}<tbody>{body}</tbody></table>' if body else ""
