"""gptworks: a GPT-style language model through its whole life. Importing it loads no torch.

`gptworks.load(FOLDER)` gives a model with `generate`, `loss` and `tokenizer`; `gptworks.train("laptop", ...)` and the
other stages are the functions behind the commands.
"""

from typing import Any

_NAMES = ("load", "train", "evaluate", "run", "Model")
__all__ = ["Model", "evaluate", "load", "run", "train"]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        from gptworks import api

        return getattr(api, name)
    raise AttributeError(f"module 'gptworks' has no attribute {name!r}")
