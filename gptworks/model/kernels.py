"""Forward and backward passes written by hand where eager torch makes many passes over memory.

Each has its plain form beside it, which the tests compare with, and which the compiler gets (it fuses by itself); the
head's stays by hand, with the compiler for what is done with its logits. `FUSED = False` makes every one plain. Sums
and statistics are in float32 whatever the precision of the input. None can be differentiated twice. Shapes: B batch,
T time, H heads, C channels a head, D width, V vocabulary, N targets.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from gptworks.model.config import logits_rows

FUSED = True

# MKL finds out at the first call of a vector function which ones this processor has. Two threads that come at the same
# time, as they do for the first table of angles, may be given others, whose last bits differ: one comes before.
torch.ones(1).cos()


def fused() -> bool:
    """True where hand-written passes are to be taken."""
    return FUSED and not torch.compiler.is_compiling()


# -- RMSNorm -----------------------------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last axis (Zhang and Sennrich 2019)."""
    if fused():
        return _RMSNorm.apply(x, weight, eps) if torch.is_grad_enabled() else _normed(x, weight, eps)[0]
    return F.rms_norm(x.float(), weight.shape, weight, eps).to(x.dtype)


def _normed(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Also gives what x is multiplied with, [..., 1]."""
    wide = x.float()
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    scale = (norm.square_() / x.shape[-1]).add_(eps).rsqrt_()
    return (wide * scale).mul_(weight).to(x.dtype), scale


class _RMSNorm(Function):
    """Keeps x and one number a row, where autograd would keep three tensors of x's size."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, scale = _normed(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        unit, wide = x.float() * scale, grad.float()
        both = wide * unit
        along = torch.mv(both.flatten(0, -2), weight).view_as(scale).div_(x.shape[-1])
        grad_x = (wide * weight).addcmul_(unit, along, value=-1).mul_(scale)
        return grad_x.to(x.dtype), both.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None, None


# -- rotary positions --------------------------------------------------------------------------------------------


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turns channels i and i + C/2 of x [B, T, H, C] together (Su et al. 2021, laid out as Hugging Face does), by the
    angles whose cosines and sines, each [B or 1, T, 1, C/2], the table has. Channels beyond the table's stay."""
    turned = 2 * table[0].shape[-1]
    if turned < x.shape[-1]:
        return torch.cat((rotate(x[..., :turned], table), x[..., turned:]), dim=-1)
    cos, sin = (t.to(x.dtype) for t in table)
    if fused():
        return _Rotate.apply(x, cos, sin) if torch.is_grad_enabled() else _turned(x, cos, sin=sin, sign=1)
    low, high = x.chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


class _Rotate(Function):
    """The backward pass is the rotation the other way; nothing of x is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin=sin, sign=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(grad, cos, sin=sin, sign=-1), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    y = torch.empty_like(x)
    (low, high), (left, right) = x.chunk(2, dim=-1), y.chunk(2, dim=-1)
    torch.mul(low, cos, out=left).addcmul_(high, sin, value=-sign)
    torch.mul(high, cos, out=right).addcmul_(low, sin, value=sign)
    return y


# -- the head and its loss ---------------------------------------------------------------------------------------


def softcap(logits: Tensor, cap: float | None) -> Tensor:
    """cap * tanh(logits / cap) (Gemma Team 2024, section 2); without a cap, the logits."""
    return logits if cap is None else torch.tanh(logits / cap) * cap


def cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor, cap: float | None = None) -> Tensor:
    """-log p of each target, in nats, [N] float32: of hidden states [N, D], the head [V, D] and targets [N] int64. No
    gradient; logits are made a chunk at a time. `cap` is the model's `final_logit_softcapping`."""
    with torch.no_grad():
        head = head.to(hidden.dtype)
        chunks = _chunks(len(hidden), head) if FUSED else [slice(None)]
        logits = (softcap(F.linear(hidden[rows], head).float(), cap) for rows in chunks)
        losses = [F.cross_entropy(l, targets[rows], reduction="none") for l, rows in zip(logits, chunks, strict=True)]
        return torch.cat(losses)


def cross_entropy_sum(
    hidden: Tensor,  # [N, D]
    head: Tensor,  # [V, D]
    targets: Tensor,  # [N] int64
    weights: Tensor,  # [N] float32, of each target
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    cap: float | None = None,  # the model's `final_logit_softcapping`
    compiled: bool = False,  # whether what is done with the logits is
) -> Tensor:
    """Weighted sum of losses in nats: cross-entropy, as asked with smoothed targets (Szegedy et al. 2016, section 7)
    and z_loss * logsumexp^2 (Chowdhery et al. 2022, section 5).

    The logits [N, V] are never whole in memory: their gradient is taken chunk by chunk, in the forward pass.
    """
    if FUSED:
        return _CrossEntropy.apply(hidden, head, targets, weights, label_smoothing, z_loss, cap, compiled)
    logits = softcap(F.linear(hidden, head.to(hidden.dtype)).float(), cap)
    losses = F.cross_entropy(logits, targets, reduction="none", label_smoothing=label_smoothing)
    if z_loss:
        losses = losses + z_loss * logits.logsumexp(-1).square()
    return (losses * weights).sum()


def _chunks(rows: int, head: Tensor) -> list[slice]:
    size = logits_rows(len(head), head.device.type)
    return [slice(start, start + size) for start in range(0, rows, size)]


def _aligned(head: Tensor) -> Tensor:
    """The head with rows of zeros added, on a GPU, to a multiple of 64: products with other sizes are slow there."""
    return F.pad(head, (0, 0, 0, -len(head) % 64)) if head.is_cuda else head


def _loss_and_gradient(
    logits: Tensor,  # [n, V or more], what the head gives
    target: Tensor,  # [n, 1]
    w: Tensor,  # [n, 1]
    size: int,  # V
    smoothing: float,
    z_loss: float,
    cap: float | None,
) -> tuple[Tensor, Tensor]:
    """The weighted sum of losses, and its gradient by the logits in their precision, zero beyond V."""
    dtype, places = logits.dtype, torch.arange(logits.shape[1], device=logits.device)
    logits = softcap(logits.float(), cap)
    if logits.shape[1] > size:  # filled up, not cut: a GPU reads whole words of rows of an even size
        logits = torch.where(places < size, logits, -torch.inf)
    logs = torch.log_softmax(logits, -1)
    hit = logs.gather(1, target)
    losses = -(1 - smoothing) * hit
    if smoothing:
        losses -= smoothing * logs[:, :size].mean(-1, keepdim=True)
    scale = w
    if z_loss:
        log_sum = logits.gather(1, target) - hit
        losses += z_loss * log_sum.square()
        scale = w * (1 + 2 * z_loss * log_sum)
    grad = logs.exp_().mul_(scale)  # softmax * scale, less each target's share of the weight
    if smoothing:
        grad[:, :size] -= smoothing / size * w
    if torch.compiler.is_compiling():  # which would write everything out before it scatters
        grad = grad - (places == target) * ((1 - smoothing) * w)
    else:
        grad.scatter_add_(1, target, -(1 - smoothing) * w)
    if cap is not None:  # tanh' = 1 - tanh^2
        inner = grad[:, :size]
        inner.addcmul_(inner, logits[:, :size].div_(cap).square_(), value=-1)
    return (losses * w).sum(), grad.to(dtype)


def _over_rows(grad: Tensor, h: Tensor) -> Tensor:
    """The head's gradient, grad.T @ h.

    In fp16 a sum over thousands of rows leaves the range whatever the scale of the loss, which comes later: h is made
    smaller as the rows are more than 256, and the sum larger again.
    """
    if h.dtype != torch.float16:
        return grad.T @ h
    smaller = 1 << (len(h) >> 8).bit_length()
    return (grad.T @ (h / smaller)).float() * smaller


@cache
def _compiled_loss_and_gradient() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(_loss_and_gradient)


class _CrossEntropy(Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        weights: Tensor,
        smoothing: float,
        z_loss: float,
        cap: float | None,
        compiled: bool,
    ) -> Tensor:
        head = _aligned(weight.to(hidden.dtype))
        grad_hidden, trained = torch.empty_like(hidden), ctx.needs_input_grad[1]
        grad_head = torch.zeros_like(weight) if trained else None
        total = hidden.new_zeros((), dtype=torch.float32)
        work = _compiled_loss_and_gradient() if compiled else _loss_and_gradient
        for rows in _chunks(len(hidden), head):
            h, target, w = hidden[rows], targets[rows, None], weights[rows, None]
            loss, grad = work(F.linear(h, head), target, w, len(weight), smoothing, z_loss, cap)
            total += loss
            torch.mm(grad, head, out=grad_hidden[rows])
            if grad_head is None:
                continue
            if head.dtype == weight.dtype and len(head) == len(weight):
                grad_head.addmm_(grad.T, h)
            else:
                grad_head += _over_rows(grad, h)[: len(weight)]
        ctx.save_for_backward(grad_hidden, grad_head)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None, None, None, None, None]:
        grad_hidden, grad_head = ctx.saved_tensors
        grad_hidden.mul_(grad)
        return grad_hidden, None if grad_head is None else grad_head.mul_(grad), None, None, None, None, None, None


# -- products in float8 ------------------------------------------------------------------------------------------


def linear_float8(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T of x [..., K] and weight [N, K], multiplied in float8: e4m3 for both, e5m2 for the gradient, each
    tensor scaled by its own largest value (Micikevicius et al. 2022). Sums are in float32, the output in x's precision.

    All three products want sizes that are multiples of 16.
    """
    return _LinearFloat8.apply(x.flatten(0, -2), weight).view(*x.shape[:-1], len(weight))


def _to_float8(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Also gives what the result is to be multiplied with."""
    scale = x.abs().max().float().clamp(min=1e-12) / torch.finfo(dtype).max
    return (x.float() / scale).to(dtype).contiguous(), scale


def _by_column(x: Tensor) -> Tensor:
    """Lays a matrix out with its columns side by side in memory, as the second factor has to be."""
    return x.T.contiguous().T


class _LinearFloat8(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        (x8, x_scale), (weight8, weight_scale) = (_to_float8(t, torch.float8_e4m3fn) for t in (x, weight))
        ctx.save_for_backward(x8, x_scale, weight8, weight_scale)
        ctx.dtype = weight.dtype
        return torch._scaled_mm(x8, weight8.T, x_scale, weight_scale, out_dtype=x.dtype, use_fast_accum=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x8, x_scale, weight8, weight_scale = ctx.saved_tensors
        grad8, scale = _to_float8(grad, torch.float8_e5m2)
        grad_x = torch._scaled_mm(grad8, _by_column(weight8), scale, weight_scale, out_dtype=grad.dtype)
        grad_weight = torch._scaled_mm(grad8.T.contiguous(), _by_column(x8), scale, x_scale, out_dtype=grad.dtype)
        return grad_x, grad_weight.to(ctx.dtype)
