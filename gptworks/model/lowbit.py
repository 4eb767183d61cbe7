"""Weights of a few bits: codes and scales in place of a matrix, multiplied as what they stand for.

A scheme is one row of `SCHEMES`. This is the plain path, on any device; what is faster or chooses better codes comes
behind the same names. Shapes: N rows (outputs), K columns (inputs), G = ceil(K / group) groups of a row.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from gptworks.core.errors import DataError
from gptworks.core.registry import resolve
from gptworks.model.linear import BlockLinear, Linear
from gptworks.model.transformer import Transformer, copy_of

# The 16 levels of NF4: quantiles of a normal distribution scaled to [-1, 1], zero among them (Dettmers et al. 2023,
# appendix E).
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass(frozen=True)
class Scheme:
    """A scheme by which the values of a group share a scale. `encode` gives codes for values divided by it, `decode`
    the values."""

    bits: int
    group: int | None  # values that share a scale; None: a whole row
    top: float  # what the largest value of a group is divided to
    encode: Callable[[Tensor], Tensor]  # float32 -> uint8 below 2^bits
    decode: Callable[[Tensor], Tensor]  # uint8 -> float32
    scale_dtype: torch.dtype

    def bytes_per_weight(self, columns: int) -> float:
        return self.bits / 8 + self.scale_dtype.itemsize / min(self.group or columns, columns)


def _nearest_nf4(values: Tensor) -> Tensor:
    levels = torch.tensor(NF4, device=values.device)
    return torch.bucketize(values, (levels[1:] + levels[:-1]) / 2).to(torch.uint8)


def _signed(bits: int) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Whole numbers from -(2^(bits-1) - 1) up, stored with an offset."""
    most = 2 ** (bits - 1) - 1
    return (
        lambda values: (values.round().clamp(-most, most) + most).to(torch.uint8),
        lambda codes: codes.float() - most,
    )


INT8 = Scheme(8, None, 127.0, *_signed(8), torch.float32)
INT4 = Scheme(4, 32, 7.0, *_signed(4), torch.float16)
NORMAL4 = Scheme(
    4,
    64,
    top=1.0,
    encode=_nearest_nf4,
    decode=lambda codes: torch.tensor(NF4, device=codes.device)[codes.int()],
    scale_dtype=torch.float16,
)
SCHEMES = {
    "int8": "gptworks.model.lowbit:INT8",
    "int4": "gptworks.model.lowbit:INT4",
    "nf4": "gptworks.model.lowbit:NORMAL4",
}


def scheme(name: str) -> Scheme:
    """Raises UsageError for a name that is none."""
    resolved: Scheme = resolve("quantization scheme", SCHEMES, name)
    return resolved


def quantize(weight: Tensor, how: Scheme) -> tuple[Tensor, Tensor]:
    """Codes, uint8 [N, K], two to a byte [N, ceil(K/2)] where they have 4 bits; and scales [N, G]. Raises DataError."""
    group = how.group or weight.shape[1]
    groups = _in_groups(weight.float(), group)  # [N, G, group]
    scales = (groups.abs().amax(-1) / how.top).to(how.scale_dtype)
    if not torch.isfinite(scales).all():
        raise DataError(f"weights of up to {groups.abs().max():.3g} are too large for a scale of 16 bits")
    divisor = scales.float()
    codes = how.encode(groups / torch.where(divisor > 0, divisor, 1.0)[..., None]).flatten(1)[:, : weight.shape[1]]
    if how.bits == 4:
        codes = _in_groups(codes, 2)
        codes = codes[..., 0] | codes[..., 1] << 4
    return codes.contiguous(), scales


def dequantize(codes: Tensor, scales: Tensor, how: Scheme, columns: int, dtype: torch.dtype) -> Tensor:
    """The matrix [N, columns] that codes and scales stand for."""
    if how.bits == 4:
        codes = torch.stack((codes & 15, codes >> 4), -1).flatten(1)[:, :columns]
    groups = _in_groups(how.decode(codes), how.group or columns)
    return (groups * scales.float()[..., None]).flatten(1)[:, :columns].to(dtype)


def _in_groups(x: Tensor, group: int) -> Tensor:
    """[N, K] as [N, ceil(K/group), group], the last one filled with zeros."""
    return F.pad(x, (0, -x.shape[1] % group)).unflatten(1, (-1, group))


class LowBitLinear(BlockLinear):
    """A frozen linear layer of codes and scales. Gradients go through it to its input."""

    codes: Tensor
    scales: Tensor
    recordable = False  # the levels that codes stand for are copied over at each product

    def __init__(self, name: str, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.name, self.how = name, scheme(name)
        self.out_features, self.in_features = weight.shape
        codes, scales = quantize(weight.detach(), self.how)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def plain_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return dequantize(self.codes, self.scales, how=self.how, columns=self.in_features, dtype=dtype)

    def trained(self) -> list[nn.Parameter]:
        return []

    def forward(self, x: Tensor) -> Tensor:
        y = _Product.apply(x, self)
        return y if self.bias is None else y + self.bias.to(x.dtype)


class _Product(Function):
    """The matrix is made anew for the backward pass, so that none outlives its product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: LowBitLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.plain_weight(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.layer.plain_weight(grad.dtype), None


def hold(model: Transformer, how: str | None) -> Transformer:
    """A frozen copy of a plain model, its layers of the blocks as `adapter.base` says and all else in float32."""
    frozen = copy_of(model.requires_grad_(False))
    kept = set()
    for name, layer in frozen.linears().items():
        assert isinstance(layer, Linear), "a plain model has plain layers"
        if how not in (None, "fp32", "bf16"):
            frozen.set_submodule(name, LowBitLinear(how, layer.weight, layer.bias))
        elif how == "bf16":
            layer.weight = nn.Parameter(layer.weight.detach().bfloat16(), requires_grad=False)
            kept.add(id(layer.weight))
    for module in frozen.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.dtype != torch.float32 and id(parameter) not in kept:
                setattr(module, name, nn.Parameter(parameter.float(), requires_grad=False))
    frozen.tie()
    return frozen
