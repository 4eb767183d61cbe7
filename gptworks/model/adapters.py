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
from gptworks.model.attention import Linear
from gptworks.model.lowbit import LowBitLinear
from gptworks.model.transformer import Transformer

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def weight_of(layer: Linear | LowBitLinear, dtype: torch.dtype = torch.float32) -> Tensor:
    """The frozen matrix [N, K] of a layer."""
    return layer.dequantized(dtype) if isinstance(layer, LowBitLinear) else layer.weight.detach().to(dtype)


class LoRALinear(nn.Module):
    """base(x) + scale * x A^T B^T, B zero at first. With a magnitude (DoRA, Liu et al. 2024): the rows of the sum of
    both matrices, each scaled to the length that is learned for it; their own length counts as a constant there."""

    def __init__(self, base: Linear | LowBitLinear, rank: int, scale: float, dropout: float, dora: bool) -> None:
        super().__init__()
        self.base, self.scale, self.dropout = base, scale, dropout
        self.in_features, self.out_features = base.in_features, base.out_features
        device = next(iter(base.state_dict().values())).device
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))
        self.magnitude = nn.Parameter(weight_of(self.base).norm(dim=1)) if dora else None

    def merged(self) -> Tensor:
        """The one matrix [N, K] that does the same, in float32."""
        weight = weight_of(self.base) + self.scale * (self.lora_B @ self.lora_A).float()
        return weight if self.magnitude is None else weight * (self.magnitude / weight.norm(dim=1))[:, None]

    def forward(self, x: Tensor) -> Tensor:
        if kernels.fused() and self.magnitude is None and not (self.training and self.dropout):
            return _Sum.apply(x, self.lora_A, self.lora_B, self.scale, self.base)
        y = self.base(x)
        lowered = F.linear(F.dropout(x, self.dropout, self.training), self.lora_A.to(x.dtype))
        update = F.linear(lowered, (self.lora_B * self.scale).to(x.dtype))
        if self.magnitude is None:
            return y + update
        with torch.no_grad():
            length = (weight_of(self.base) + self.scale * (self.lora_B @ self.lora_A)).norm(dim=1)
        bias = self.base.bias
        factor = (self.magnitude / length).to(x.dtype)
        if bias is None:
            return (y + update) * factor
        return (y - bias.to(x.dtype) + update) * factor + bias.to(x.dtype)


class _Sum(Function):
    """base(x) + scale * x A^T B^T, each product added where it is made; the frozen matrix gets no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, scale: float, base: Linear | LowBitLinear) -> Tensor:
        rows, low_a, low_b = x.flatten(0, -2), a.to(x.dtype), b.to(x.dtype)
        bias = None if base.bias is None else base.bias.to(x.dtype)
        y, lowered = F.linear(rows, weight_of(base, x.dtype), bias), rows @ low_a.T
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
            grad_x = (grad @ weight_of(ctx.base, grad.dtype)).addmm_(grad_lowered, a).view(ctx.shape)
        grad_b = (grad.T @ lowered).to(ctx.dtype).mul_(ctx.scale)
        return grad_x, (grad_lowered.T @ rows).to(ctx.dtype), grad_b, None, None


# -- onto a model and off again ----------------------------------------------------------------------------------


def copy_of(model: Transformer) -> Transformer:
    """A copy whose trained parameters are its own; all else is shared."""
    shared = [p for p in model.parameters() if not p.requires_grad] + list(model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


def attach(model: Transformer, adapter: Adapter, seed: int) -> Transformer:
    """A frozen copy of a plain model with adapters, which alone are trained; `seed` gives A. Raises UsageError.

    The layers of the blocks are held as `adapter.base` says. What stays as it was is shared with `model`.
    """
    targets = adapter.target_modules or list(LINEARS)
    for target in targets:
        if target not in LINEARS:
            raise UsageError(f"adapter.target_modules has {target!r}: {nearest(target, list(LINEARS))}")
    made = hold(model, adapter.base)
    generator = torch.Generator().manual_seed(seed)
    scale = adapter.alpha / (math.sqrt(adapter.rank) if adapter.use_rslora else adapter.rank)
    adapted = 0
    for name, layer in linears(model):
        held = made.get_submodule(name)
        assert isinstance(held, Linear | LowBitLinear)
        if name.rpartition(".")[2] in targets:
            lora = LoRALinear(held, adapter.rank, scale, adapter.dropout, adapter.use_dora)
            uniform = torch.rand(lora.lora_A.shape, generator=generator) * 2 - 1
            lora.lora_A.data.copy_(uniform / math.sqrt(layer.in_features))  # as a linear layer's usual start
            made.set_submodule(name, lora)
            adapted += 1
    if not adapted:
        raise UsageError(f"adapter.target_modules={targets}: a {model.config.family} model has none of them")
    return made


def resume(model: Transformer) -> Transformer:
    """A copy of a model with adapters, which are trained further."""
    for layer in adapters(model).values():
        layer.requires_grad_(True)
        layer.base.requires_grad_(False)
    return copy_of(model)


def linears(model: Transformer) -> list[tuple[str, Linear]]:
    """The plain linear layers of the blocks, by name."""
    found = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, Linear)]
    return [(name, layer) for name, layer in found if name != "lm_head" and not name.endswith(".mlp.gate")]


def hold(model: Transformer, how: str | None) -> Transformer:
    """A frozen copy of a plain model, its layers of the blocks as `adapter.base` says and all else in float32."""
    made = copy_of(model.requires_grad_(False))
    for name, layer in linears(made):
        made.set_submodule(name, held_as(layer, how))
    kept = {id(layer.weight) for _, layer in linears(made)} if how == "bf16" else set()
    for module in made.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.dtype != torch.float32 and id(parameter) not in kept:
                setattr(module, name, nn.Parameter(parameter.float(), requires_grad=False))
    made.tie()
    return made


def held_as(layer: Linear, how: str | None) -> Linear | LowBitLinear:
    """A frozen layer in the form that `adapter.base` names."""
    if how in (None, "fp32"):
        return layer
    if how != "bf16":
        return LowBitLinear(how, layer.weight, layer.bias)
    layer.weight = nn.Parameter(layer.weight.detach().bfloat16(), requires_grad=False)
    return layer


def adapters(model: Transformer) -> dict[str, LoRALinear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoRALinear)}


@torch.no_grad()
def merge(model: Transformer) -> Transformer:
    """The plain model in float32 that does the same: adapters added to their bases, codes to what they stand for."""
    theirs = {id(p): p for p in model.parameters()}
    made = copy.deepcopy(model, dict(theirs))  # shares them all
    for name, layer in list(made.named_modules()):
        if isinstance(layer, (LoRALinear, LowBitLinear)) and not name.endswith(".base"):
            bias = layer.base.bias if isinstance(layer, LoRALinear) else layer.bias
            plain = Linear(layer.in_features, layer.out_features, bias=bias is not None, device="meta")
            plain.weight = nn.Parameter(layer.merged() if isinstance(layer, LoRALinear) else weight_of(layer))
            if bias is not None:
                plain.bias = bias
            made.set_submodule(name, plain)
    for module in made.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) in theirs:
                setattr(module, name, nn.Parameter(parameter.detach().float().clone()))
    made.tie()
    return made
