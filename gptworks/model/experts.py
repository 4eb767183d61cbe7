"""A sparse feed-forward part: a router sends each token to a few of many gated MLPs (Shazeer et al. 2017; Jiang et al.
2024, section 2.1). No token is dropped, however full an expert gets.

Shapes: N tokens, D width, E experts, k experts a token, F width of an expert.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from gptworks.model.config import ModelConfig
from gptworks.model.linear import Linear


class Weights(nn.Module):
    """The matrices of all experts, one above the other; unset at first."""

    def __init__(self, experts: int, inner: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Parameter(torch.empty(experts, inner, width))
        self.up_proj = nn.Parameter(torch.empty(experts, inner, width))
        self.down_proj = nn.Parameter(torch.empty(experts, width, inner))


class SparseMLP(nn.Module):
    """The sum over a token's k likeliest experts of its share in each times down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.chosen, self.normalise = config.num_experts_per_tok, config.norm_topk_prob
        self.gate = Linear(config.hidden_size, config.num_experts, bias=False)  # the router
        self.experts = Weights(config.num_experts, config.moe_intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, T, D] of the same, and the router's logits [N, E]."""
        rows, k, w = x.flatten(0, -2), self.chosen, self.experts
        logits = self.gate(rows)
        shares, experts = self.choose(logits)
        by_expert = experts.flatten().argsort(stable=True)  # of the N k copies of tokens
        back = by_expert.argsort()
        numbers = torch.arange(len(w.gate_proj), device=x.device)
        ends = torch.searchsorted(experts.flatten()[by_expert], numbers, right=True).int()
        copies = _Reordered.apply(rows, by_expert // k, back, k)
        inner = F.silu(grouped(copies, w.gate_proj, ends)) * grouped(copies, w.up_proj, ends)
        y = _Reordered.apply(grouped(inner, w.down_proj, ends), back, by_expert, 1).view(-1, k, x.shape[-1])
        return torch.einsum("nk,nkd->nd", shares.to(x.dtype), y).view_as(x), logits

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Share and number of each token's experts, both [N, k], from the router's logits [N, E]."""
        shares, experts = torch.softmax(logits.float(), -1).topk(self.chosen, -1)
        if self.normalise:
            shares = shares / shares.sum(-1, keepdim=True)
        return shares, experts


def grouped(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Rows [M, K] of x, up to ends[0] times the first of weights [E, N, K], up to ends[1] times the second, ..."""
    weights = weights.to(x.dtype)
    aligned = not any(size * x.element_size() % 16 for size in weights.shape[1:])
    if x.is_cuda and x.dtype == torch.bfloat16 and aligned:  # as its kernel wants them
        return F.grouped_mm(x, weights.mT, offs=ends)
    sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
    return torch.cat([rows @ weight.T for rows, weight in zip(x.split(sizes), weights.unbind(), strict=True)])


class _Reordered(Function):
    """x[there]; the gradient is taken back by x's own places `back`, where each of k copies has one, and not added up
    row by row in whatever order they come."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Tensor, back: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(back)
        ctx.k = k
        return x.index_select(0, there)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (back,) = ctx.saved_tensors
        grad = grad.index_select(0, back)
        return (grad if ctx.k == 1 else grad.unflatten(0, (-1, ctx.k)).sum(1)), None, None, None


# -- what keeps a router useful ----------------------------------------------------------------------------------


def balance_loss(logits: Tensor, k: int, weights: Tensor) -> Tensor:
    """E * sum over experts of (tokens sent to it) * (mean probability of it): k where all are used alike (Fedus et al.
    2021, equations 4 to 6; for k > 1 as transformers counts it). Of logits [N, E] and token weights [N]."""
    shares = torch.softmax(logits.float(), -1)
    sent = F.one_hot(shares.topk(k, -1).indices, shares.shape[-1]).sum(1).float()  # [N, E]
    weights = (weights / weights.sum().clamp(min=1e-9))[:, None]
    return shares.shape[-1] * ((sent * weights).sum(0) * (shares * weights).sum(0)).sum()


def router_z_loss(logits: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum of logsumexp^2 (Zoph et al. 2022, equation 5)."""
    return (logits.float().logsumexp(-1).square() * weights).sum()


def expert_load(routing: Sequence[Tensor], k: int) -> Tensor:
    """The share of tokens' choices that each expert of each layer gets, [layers, E]."""
    counts = [torch.bincount(logits.topk(k, -1).indices.flatten(), minlength=logits.shape[-1]) for logits in routing]
    counted = torch.stack(counts).float()
    return counted / counted.sum(-1, keepdim=True)
