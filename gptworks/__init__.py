"""gptworks: a GPT-style language model through its whole life. Importing it loads no torch.

`gptworks.load(FOLDER)` gives a model with `generate`, `loss` and `tokenizer`; `train`, `run` and `evaluate` are
what the commands of these names do.
"""

from typing import Any

_NAMES = ("Model", "evaluate", "load", "run", "train")
__all__ = ["Model", "evaluate", "load", "run", "train"]


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
