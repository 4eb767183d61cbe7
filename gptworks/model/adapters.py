"""Low-rank adapters (LoRA, Hu et al. 2021): a frozen model with small matrices beside its own.

Applied to a built model from outside; the decoder knows nothing of it. Shapes: N outputs, K inputs, R rank.
"""

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from gptworks.core.config import Adapter
from gptworks.core.errors import UsageError
from gptworks.core.registry import nearest
from gptworks.model import kernels
from gptworks.model.linear import BlockLinear, Linear
from gptworks.model.lowbit import hold
from gptworks.model.transformer import Transformer, copy_of

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoRALinear(BlockLinear):
    """base(x) + scale * x A^T B^T, B zero at first. With a magnitude (DoRA, Liu et al. 2024): the rows of the sum of
    both matrices, each scaled to the length that is learned for it; their own length counts as a constant there."""

    def __init__(self, base: BlockLinear, rank: int, scale: float, dropout: float, dora: bool) -> None:
        super().__init__()
        self.base, self.scale, self.dropout = base, scale, dropout
        self.in_features, self.out_features = base.in_features, base.out_features
        device = next(iter(base.state_dict().values())).device
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))
        self.magnitude = nn.Parameter(base.plain_weight().norm(dim=1)) if dora else None
        self.recordable = base.recordable

    @property
    def bias(self) -> nn.Parameter | None:
        return self.base.bias

    def plain_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        weight = self.base.plain_weight() + self.scale * (self.lora_B @ self.lora_A).detach().float()
        if self.magnitude is not None:
            weight = weight * (self.magnitude.detach() / weight.norm(dim=1))[:, None]
        return weight.to(dtype)

    def trained(self) -> list[nn.Parameter]:
        return [self.lora_A, self.lora_B] + ([] if self.magnitude is None else [self.magnitude])

    def forward(self, x: Tensor) -> Tensor:
        if kernels.fused() and self.magnitude is None and not (self.training and self.dropout):
            return _Sum.apply(x, self.lora_A, self.lora_B, self.scale, self.base)
        y = self.base(x)
        lowered = F.linear(F.dropout(x, self.dropout, self.training), self.lora_A.to(x.dtype))
        update = F.linear(lowered, (self.lora_B * self.scale).to(x.dtype))
        if self.magnitude is None:
            return y + update
        with torch.no_grad():
            length = (self.base.plain_weight() + self.scale * (self.lora_B @ self.lora_A)).norm(dim=1)
        bias = self.base.bias
        factor = (self.magnitude / length).to(x.dtype)
        if bias is None:
            return (y + update) * factor
        return (y - bias.to(x.dtype) + update) * factor + bias.to(x.dtype)


class _Sum(Function):
    """base(x) + scale * x A^T B^T, each product added where it is made; the frozen matrix gets no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, scale: float, base: BlockLinear) -> Tensor:
        rows, low_a, low_b = x.flatten(0, -2), a.to(x.dtype), b.to(x.dtype)
        bias = None if base.bias is None else base.bias.to(x.dtype)
        y, lowered = F.linear(rows, base.plain_weight(x.dtype), bias), rows @ low_a.T
        y.addmm_(lowered, low_b.T, alpha=scale)
        ctx.save_for_backward(rows, lowered, low_a, low_b)
        ctx.scale, ctx.base, ctx.dtype, ctx.shape = scale, base, a.dtype, x.shape
        return y.view(*x.shape[:-1], len(b))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None, None]:
        rows, lowered, a, b = ctx.saved_tensors
        grad = grad.flatten(0, -2)
        grad_lowered, grad_x = (grad @ b).mul_(ctx.scale), None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ ctx.base.plain_weight(grad.dtype)).addmm_(grad_lowered, a).view(ctx.shape)
        grad_b = (grad.T @ lowered).to(ctx.dtype).mul_(ctx.scale)
        return grad_x, (grad_lowered.T @ rows).to(ctx.dtype), grad_b, None, None


# -- onto a model and off again ----------------------------------------------------------------------------------


def attach(model: Transformer, adapter: Adapter, seed: int) -> Transformer:
    """A frozen copy of a plain model in the form that `adapter.base` names, with fresh adapters. Raises UsageError.

    What stays as it was is shared with `model`.
    """
    return add(hold(model, adapter.base), adapter, seed)


def add(model: Transformer, adapter: Adapter, seed: int) -> Transformer:
    """Gives a frozen model adapters, which alone are trained, and returns it; `seed` gives A. Raises UsageError."""
    targets = adapter.target_modules or list(LINEARS)
    for target in targets:
        if target not in LINEARS:
            raise UsageError(f"adapter.target_modules has {target!r}: {nearest(target, list(LINEARS))}")
    generator = torch.Generator().manual_seed(seed)
    scale = adapter.alpha / (math.sqrt(adapter.rank) if adapter.use_rslora else adapter.rank)
    adapted = {name: layer for name, layer in model.linears().items() if name.rpartition(".")[2] in targets}
    if not adapted:
        raise UsageError(f"adapter.target_modules={targets}: a {model.config.family} model has none of them")
    for name, layer in adapted.items():
        lora = LoRALinear(layer, adapter.rank, scale=scale, dropout=adapter.dropout, dora=adapter.use_dora)
        uniform = torch.rand(lora.lora_A.shape, generator=generator) * 2 - 1
        lora.lora_A.data.copy_(uniform / math.sqrt(layer.in_features))  # as a linear layer's usual start
        model.set_submodule(name, lora)
    return model


def resume(model: Transformer) -> Transformer:
    """A copy of a model with adapters, which are trained further."""
    for layer in adapters(model).values():
        for parameter in layer.trained():
            parameter.requires_grad_(True)
    return copy_of(model)


def adapters(model: Transformer) -> dict[str, LoRALinear]:
    """The layers of a model that have an adapter, by name."""
    return {name: layer for name, layer in model.linears().items() if isinstance(layer, LoRALinear)}


@torch.no_grad()
def merge(model: Transformer) -> Transformer:
    """The plain model in float32 that does the same: adapters added to their bases, codes to what they stand for."""
    theirs = {id(p): p for p in model.parameters()}
    plain = copy.deepcopy(model, dict(theirs))  # shares them all
    for name, layer in plain.linears().items():
        if not isinstance(layer, Linear):
            merged = Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
            merged.weight = nn.Parameter(layer.plain_weight())
            if layer.bias is not None:
                merged.bias = layer.bias
            plain.set_submodule(name, merged)
    for module in plain.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) in theirs:
                setattr(module, name, nn.Parameter(parameter.detach().float().clone()))
    plain.tie()
    return plain
