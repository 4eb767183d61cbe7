"""What is done to a model before it is trained, and what every form of a linear layer answers."""

import pytest
import tiny
import torch

from gptworks.core.config import Config
from gptworks.core.errors import UsageError
from gptworks.model import adapters, build, lowbit, transforms
from gptworks.model.linear import BlockLinear, Linear
from gptworks.model.transforms import TRANSFORMS, Transform, transformed


def plain():
    return build.fresh(tiny.shape(), 1)


def layers() -> dict[str, BlockLinear]:
    """A layer of 5 outputs and 32 inputs in every form that a block's may have."""
    matrix = Linear(32, 5)
    matrix.weight.data.normal_(generator=torch.Generator().manual_seed(1))
    matrix.bias.data.fill_(0.5)
    low = lowbit.LowBitLinear("nf4", matrix.weight, matrix.bias)
    forms: dict[str, BlockLinear] = {"plain": matrix, "low-bit": low}
    for name, dora in (("lora", False), ("dora", True)):
        forms[name] = adapters.LoRALinear(low, 2, scale=0.5, dropout=0.0, dora=dora)
        forms[name].lora_A.data.normal_(generator=torch.Generator().manual_seed(2))  # unset until now
        forms[name].lora_B.data.fill_(0.1)
    return forms


@pytest.mark.parametrize("form", layers())
def test_every_form_of_a_linear_layer_is_one_plain_matrix(form):
    layer, x = layers()[form], torch.randn(3, 32)
    expected = torch.nn.functional.linear(x, layer.plain_weight(), layer.bias)
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)
    assert layer.plain_weight(torch.bfloat16).dtype == torch.bfloat16 and not layer.plain_weight().requires_grad


def test_what_a_form_trains_are_the_parameters_that_get_a_gradient():
    asked = Config.model_validate(
        {"model": {"path": "base"}, "adapter": {"kind": "lora", "rank": 2, "base": "int8", "use_dora": True}}
    )
    run = transformed(plain(), asked)
    trained = {id(p) for layer in run.linears().values() for p in layer.trained()}
    assert trained == {id(p) for p in run.parameters() if p.requires_grad} and len(trained) == 3 * len(run.linears())


def test_a_model_is_transformed_by_every_row_that_is_wanted_in_the_order_of_the_table(monkeypatch):
    order = []

    def row(name, wanted):
        return Transform(lambda asked: wanted, lambda model, asked: order.append(name) or model)

    rows = {"first": row("first", True), "never": row("never", False), "last": row("last", True)}
    monkeypatch.setattr(transforms, "TRANSFORMS", rows)
    model = plain()
    assert transformed(model, tiny.chosen_config()) is model and order == ["first", "last"]
    assert list(TRANSFORMS) == ["frozen base", "lora", "freeze", "float8"]


def test_nothing_is_transformed_where_nothing_is_asked_for():
    model = plain()
    assert transformed(model, tiny.chosen_config()) is model and all(p.requires_grad for p in model.parameters())
    with pytest.raises(UsageError, match="no parameter matches"):
        transformed(model, tiny.chosen_config(train={"freeze": ["nowhere.*"]}))
