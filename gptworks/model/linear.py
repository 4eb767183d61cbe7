"""The linear layers of a block, and what anything that stands in their place has to answer."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptworks.model.kernels import linear_float8


class BlockLinear(nn.Module):
    """x W^T + bias, in whatever form the matrix W [N, K] is kept: N outputs, K inputs.

    A plain layer is one, and so are those that replace it: low-bit codes, a matrix with an adapter. What merges or
    exports models asks these questions and not for a class.
    """

    in_features: int
    out_features: int
    bias: Any  # a parameter, or None
    recordable = True  # a CUDA graph can hold its product: nothing in it waits for the host

    def plain_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The one matrix [N, K] that does the same, without gradient."""
        raise NotImplementedError

    def trained(self) -> list[nn.Parameter]:
        """The parameters that are trained where a model in this form is trained."""
        raise NotImplementedError


class Linear(nn.Linear, BlockLinear):
    """Keeps its weight in full precision and multiplies in the precision of its input.

    Like every module here it starts unset: values come from `Transformer.initialise` or from a file.
    """

    def reset_parameters(self) -> None: ...

    def plain_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.weight.detach().to(dtype)

    def trained(self) -> list[nn.Parameter]:
        return list(self.parameters())

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype) if self.bias is not None else None
        if x.is_cuda and x.dtype == torch.float32 and x.numel() == self.in_features and not torch.is_grad_enabled():
            # Of one row: a product of matrices would leave most of the GPU idle.
            row = x.flatten()
            return (weight @ row if bias is None else torch.addmv(bias, weight, row)).view(*x.shape[:-1], -1)
        return F.linear(x, weight, bias)


class Float8Linear(Linear):
    """Multiplies in float8 while it is trained, and as a plain one otherwise."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        y = linear_float8(x, self.weight)
        return y if self.bias is None else y + self.bias.to(x.dtype)
