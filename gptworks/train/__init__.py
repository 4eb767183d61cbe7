"""Training: the loop and what stands around it.

`gptworks.train(RECIPE)` is a stage of the public interface, and this package, once imported, takes that name. So it can
be called, and is the same function then.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any


class _Stage(ModuleType):
    def __call__(self, *arguments: Any, **options: Any) -> dict[str, Any]:
        """`gptworks.api.train`."""
        result: dict[str, Any] = import_module("gptworks.api").train(*arguments, **options)
        return result


sys.modules[__name__].__class__ = _Stage
