"""What is done to a model before it is trained: a table, from first to last, each where the configuration asks for it.

The decoder and the loop know nothing of them. Another way to hold or to train weights is another row.
"""

import fnmatch
from collections.abc import Callable
from typing import NamedTuple

from gptworks.core.config import Config
from gptworks.core.errors import UsageError
from gptworks.model import adapters, lowbit
from gptworks.model.linear import Float8Linear, Linear
from gptworks.model.transformer import Transformer


class Transform(NamedTuple):
    """One change of a model: where it is wanted, and the model that it makes. It may change its argument."""

    wanted: Callable[[Config], bool]
    apply: Callable[[Transformer, Config], Transformer]


def transformed(model: Transformer, config: Config) -> Transformer:
    """The model as the configuration trains it. Raises UsageError."""
    for transform in TRANSFORMS.values():
        if transform.wanted(config):
            model = transform.apply(model, config)
    return model


def _frozen_base(model: Transformer, config: Config) -> Transformer:
    """A model that was opened with its adapters is in the form that `adapter.base` named then."""
    return model if adapters.adapters(model) else lowbit.hold(model, config.adapter.base)


def _lora(model: Transformer, config: Config) -> Transformer:
    if adapters.adapters(model):
        return adapters.resume(model)
    return adapters.add(model, config.adapter, config.train.seed)


def freeze(model: Transformer, patterns: list[str]) -> None:
    """Parameters whose names match keep their values. Raises UsageError for a pattern that matches nothing."""
    parameters = dict(model.named_parameters())
    for pattern in patterns:
        names = fnmatch.filter(parameters, pattern)
        if not names:
            raise UsageError(
                f"train.freeze has {pattern!r}, which no parameter matches; there is {next(iter(parameters))}"
            )
        for name in names:
            parameters[name].requires_grad_(False)
    if not any(p.requires_grad for p in parameters.values()):
        raise UsageError("train.freeze leaves nothing to train")


def _freeze(model: Transformer, config: Config) -> Transformer:
    freeze(model, config.train.freeze)
    return model


def use_float8(model: Transformer) -> Transformer:
    """Has the linear layers of the blocks train in float8, those whose sizes allow it. Weights stay as they are."""
    for layer in model.model.layers.modules():
        if type(layer) is Linear and not (layer.in_features % 16 or layer.out_features % 16):
            layer.__class__ = Float8Linear
    return model


TRANSFORMS = {
    "frozen base": Transform(lambda config: config.adapter.kind is not None, _frozen_base),
    "lora": Transform(lambda config: config.adapter.kind == "lora", _lora),
    "freeze": Transform(lambda config: bool(config.train.freeze), _freeze),
    "float8": Transform(lambda config: config.train.precision == "fp8", lambda model, config: use_float8(model)),
}
