"""Chat templates: Jinja programs that come with a model folder, so other people's.

They run in Jinja's sandbox, and that in a process of its own, which may open no file, start no process, and is ended by
the system beyond its time and memory.
"""

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterable
from datetime import datetime
from typing import Any

from gptworks.core.errors import DataError

SECONDS = 1.0  # of the processor, for one text
CHARACTERS = 1_000_000  # of one text
MEMORY = 2**30  # bytes of address space
PATIENCE = 60  # seconds by the clock, on a machine that is busy with something else

Messages = list[dict[str, str]]


def render(source: str, conversations: list[Messages], variables: dict[str, Any]) -> list[str]:
    """The text of each conversation, by a template of our own, in this process."""
    template = _environment().from_string(source)
    return [_limited(template.generate(messages=messages, **variables)) for messages in conversations]


def render_foreign(
    source: str, conversations: list[Messages], variables: dict[str, Any], where: str = "chat template"
) -> list[str]:
    """Like `render`, for a template that is not ours. Raises DataError that begins with `where`."""
    request = json.dumps([source, conversations, variables])
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", __name__],
            input=request.encode(),
            capture_output=True,
            timeout=PATIENCE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
    except subprocess.TimeoutExpired:
        raise DataError(f"{where}: no answer within {PATIENCE} s") from None
    if done.returncode == -signal.SIGPROF:
        raise DataError(f"{where}: stopped after {SECONDS:g} s; it may never end")
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        raise DataError(f"{where}: it broke the process that ran it (exit status {done.returncode})") from None
    if "refused" in answer:
        raise DataError(f"{where}: {answer['refused'][:500]}")
    return list(answer["texts"])


def _limited(parts: Iterable[str]) -> str:
    texts, size = [], 0
    for part in parts:
        texts.append(part)
        size += len(part)
        if size > CHARACTERS:
            raise ValueError(f"it makes a text of more than {CHARACTERS:,} characters")
    return "".join(texts)


def _environment() -> Any:
    """Jinja's immutable sandbox, with the functions that `transformers` gives a template."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """{% generation %} marks what a trainer learns from; here its content stands for itself."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class Names(Namespace):
        """A namespace that refuses names with a leading underscore: Python's own, which Jinja might call."""

        def __init__(*args: Any, **values: Any) -> None:  # noqa: N805  `self` may be a name too
            Namespace.__init__(args[0])
            for name, value in dict(*args[1:], **values).items():
                args[0][name] = value

        def __setitem__(self, name: str, value: Any) -> None:
            if str(name).startswith("_"):
                raise jinja2.exceptions.SecurityError(f"a namespace may not have {str(name)[:80]!r}")
            Namespace.__setitem__(self, name, value)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None,
               sort_keys: bool = False) -> str:  # fmt: skip
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals = {
        "range": environment.globals["range"],  # the sandbox's, of 100,000 at most
        "dict": lambda *args, **values: dict(*args, **values),
        "namespace": Names,
        "raise_exception": raise_exception,
        "strftime_now": lambda pattern: datetime.now().strftime(pattern),
    }
    return environment


def _serve() -> None:
    """Runs the process that `render_foreign` starts: one request on standard input, one answer on standard output."""
    import jinja2.debug

    source, conversations, variables = json.load(sys.stdin)
    render("{{ 'x' | trim }}{{ strftime_now('') }}", [[]], {})  # imports what it needs, which no file can be later
    for kind, limit in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_NOFILE, 3), (resource.RLIMIT_NPROC, 0)):
        resource.setrlimit(kind, (limit, limit))
    answer: dict[str, Any] = {"texts": []}
    try:
        for messages in conversations:
            signal.setitimer(signal.ITIMER_PROF, SECONDS)  # SIGPROF ends the process, even inside a C function
            answer["texts"] += render(source, [messages], variables)
    except Exception as error:
        own = type(error) is jinja2.TemplateError  # the template's own words, by raise_exception
        answer = {"refused": str(error) if own else f"{type(error).__name__}: {error}".rstrip(": ")}
    signal.setitimer(signal.ITIMER_PROF, 0)
    print(json.dumps(answer))


if __name__ == "__main__":
    _serve()
