"""gptworks trains, evaluates, uses and exports GPT-style language models. Importing it loads no torch.

`gptworks.load(FOLDER)` gives a model with `generate`, `loss` and `tokenizer`; the other functions are what the commands
of their names do, and give back what those print with `--json`.
"""

from typing import Any

_NAMES = ("Model", "evaluate", "export", "generate", "load", "merge", "push", "report", "run", "train", "verify")
__all__ = ["Model", "evaluate", "export", "generate", "load", "merge", "push", "report", "run", "train", "verify"]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        from gptworks import api

        return getattr(api, name)
    if name == "__version__":
        from importlib.metadata import version

        return version("gptworks")
    raise AttributeError(f"module 'gptworks' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_NAMES, "__version__"])
