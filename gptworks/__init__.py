"""gptworks trains, evaluates, uses and exports GPT-style language models. Importing it loads no torch.

`gptworks.load(FOLDER)` gives a model with `generate`, `loss` and `tokenizer`; the other functions are what the commands
of their names do, and give back what those print with `--json`.
"""

import typing as _typing

if _typing.TYPE_CHECKING:
    from gptworks.api import (
        Model,
        compare,
        continue_run,
        evaluate,
        export,
        generate,
        load,
        merge,
        plan,
        push,
        report,
        run,
        train,
        verify,
    )

    __version__: str

__all__ = [
    "Model", "compare", "continue_run", "evaluate", "export", "generate", "load", "merge", "plan", "push", "report",
    "run", "train", "verify",
]  # fmt: skip


if not _typing.TYPE_CHECKING:  # else a type checker would take any name for one of these

    def __getattr__(name):
        if name in __all__:
            from gptworks import api

            return getattr(api, name)
        if name == "__version__":
            from importlib.metadata import version

            return version("gptworks")
        raise AttributeError(f"module 'gptworks' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
