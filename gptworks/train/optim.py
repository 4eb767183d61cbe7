"""Optimizers.

AdamW and Adam are torch's own (fused where it can). Muon is ours: momentum, then the nearest semi-orthogonal matrix,
computed for all matrices of one shape at once, and by several processes each for its share of them.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gptworks.core.config import Train
from gptworks.core.errors import UsageError
from gptworks.core.ranks import ranks
from gptworks.core.registry import resolve

OPTIMIZERS = {
    "muon": "gptworks.train.optim:make_muon",
    "adamw": "gptworks.train.optim:make_adamw",
    "adam": "gptworks.train.optim:make_adam",
    "sgd": "gptworks.train.optim:make_sgd",
}
Group = dict[str, Any]

# -- groups: what decays, what Muon takes ------------------------------------------------------------------------


def is_matrix(name: str, parameter: Tensor) -> bool:
    """A matrix inside a block: what Muon turns, and what weight decay and penalties act on (with the embeddings)."""
    return parameter.ndim == 2 and "layers." in name


def decays(name: str, parameter: Tensor) -> bool:
    """Matrices decay; biases, norms and position tables do not."""
    return parameter.ndim == 2 and "embed_positions" not in name


def split(model: nn.Module, choose: Callable[[str, Tensor], bool]) -> tuple[list[Tensor], list[Tensor]]:
    yes: list[Tensor] = []
    no: list[Tensor] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (yes if choose(name, parameter) else no).append(parameter)
    return yes, no


def _decay_groups(model: nn.Module, train: Train, lr: float) -> list[Group]:
    decayed, plain = split(model, decays)
    groups: list[Group] = [
        {"params": decayed, "weight_decay": train.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return [{**group, "lr": lr, "peak_lr": lr} for group in groups if group["params"]]


# -- the optimizers ----------------------------------------------------------------------------------------------


def make_adamw(model: nn.Module, train: Train) -> list[torch.optim.Optimizer]:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019)."""
    return [torch.optim.AdamW(_decay_groups(model, train, _rate(train)), betas=train.betas, eps=1e-8, fused=True)]


def make_adam(model: nn.Module, train: Train) -> list[torch.optim.Optimizer]:
    """Adam (Kingma and Ba 2015); `train.weight_decay`, if set, is decoupled here too, and `train.l2` is its own L2."""
    return make_adamw(model, train)


def make_sgd(model: nn.Module, train: Train) -> list[torch.optim.Optimizer]:
    """Gradient descent, with momentum and Nesterov's look-ahead as set; decay is decoupled."""
    return [SGD(_decay_groups(model, train, _rate(train)), train.momentum or 0.0, train.nesterov)]


def make_muon(model: nn.Module, train: Train) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for embeddings, head, norms and biases (Jordan et al. 2024)."""
    matrices, rest = split(model, is_matrix)
    if not matrices:
        raise UsageError("train.optimizer=muon needs matrices inside blocks; use adamw for this model")
    lr, adam_lr = _rate(train), train.adam_lr if train.adam_lr is not None else _rate(train)
    muon = Muon(
        [{"params": matrices, "lr": lr, "peak_lr": lr, "weight_decay": train.weight_decay or 0.0}],
        momentum=train.momentum if train.momentum is not None else 0.95,
        nesterov=train.nesterov,
    )
    group = {"params": rest, "lr": adam_lr, "peak_lr": adam_lr, "rate": "adam_lr", "weight_decay": 0.0}
    return [muon, torch.optim.AdamW([group], betas=train.betas, eps=1e-8, fused=True)]


def _rate(train: Train) -> float:
    assert train.lr is not None, "the dial sets this"
    return train.lr


def _slot(optimizer: torch.optim.Optimizer, w: Tensor) -> Tensor:
    """The momentum buffer of a parameter, zero at first."""
    state = optimizer.state[w]
    if "momentum" not in state:
        state["momentum"] = torch.zeros_like(w)
    return state["momentum"]


class SGD(torch.optim.Optimizer):
    """v = momentum v + g; w -= lr (g + momentum v) with Nesterov's look-ahead, lr v without; decay shrinks w first."""

    def __init__(self, params: Any, momentum: float, nesterov: bool) -> None:
        super().__init__(params, {"momentum": momentum, "nesterov": nesterov, "weight_decay": 0.0, "lr": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for w in group["params"]:
                if w.grad is None:
                    continue
                w.mul_(1 - lr * group["weight_decay"])
                update = w.grad
                if momentum:
                    velocity = _slot(self, w)
                    velocity.mul_(momentum).add_(w.grad)
                    update = w.grad.add(velocity, alpha=momentum) if group["nesterov"] else velocity
                w.add_(update, alpha=-lr)


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by Newton–Schulz (Jordan et al. 2024), one batched product for all matrices of a shape.

    v = momentum v + (1 - momentum) g; update = lr * sqrt(max(1, rows/columns)) * orthogonal(g, v); decay is decoupled.
    """

    def __init__(self, params: Any, momentum: float, nesterov: bool, steps: int = 5) -> None:
        defaults = {
            "momentum": momentum,
            "nesterov": nesterov,
            "steps": steps,
            "weight_decay": 0.0,
            "lr": 0.0,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[tuple[int, int], list[Tensor]] = {}
            for w in group["params"]:
                if w.grad is not None:
                    shapes.setdefault((max(w.shape), min(w.shape)), []).append(w)
            for weights in shapes.values():
                self._step_shape(weights, group)

    def _step_shape(self, weights: list[Tensor], group: Group) -> None:
        lr, momentum = group["lr"], group["momentum"]
        gradients = [w.grad for w in weights if w.grad is not None]
        velocities = [_slot(self, w) for w in weights if w.grad is not None]
        torch._foreach_lerp_(velocities, gradients, 1 - momentum)
        updates = torch._foreach_lerp(gradients, velocities, momentum) if group["nesterov"] else velocities
        wide = torch.stack([u if u.shape[0] <= u.shape[1] else u.T for u in updates])  # [N, rows <= columns]
        turned = ranks.shared(lambda part: orthogonalise(part, group["steps"]), wide)
        for w, update in zip(weights, turned, strict=True):
            rows, columns = w.shape
            update = update if rows <= columns else update.T
            w.mul_(1 - lr * group["weight_decay"])
            w.add_(update, alpha=-lr * math.sqrt(max(1.0, rows / columns)))


def orthogonalise(x: Tensor, steps: int = 5) -> Tensor:
    """The polar factor of each matrix of x [N, rows, columns], rows <= columns, to Newton–Schulz accuracy.

    The quintic 3.4445 s - 4.7750 s^3 + 2.0315 s^5 drives every singular value s near 1 (Jordan et al. 2024), in bf16
    where matrices multiply faster so.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    out = x.dtype
    x = x.bfloat16() if x.is_cuda else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, poly, x, beta=a)
    return x.to(out)


def make_optimizers(model: nn.Module, train: Train) -> list[torch.optim.Optimizer]:
    """The optimizers `train.optimizer` names; every trainable parameter belongs to exactly one group, or it raises."""
    optimizers = resolve("optimizer", OPTIMIZERS, train.optimizer)(model, train)
    grouped = [id(p) for o in optimizers for g in o.param_groups for p in g["params"]]
    wanted = {id(p) for p in model.parameters() if p.requires_grad}
    if set(grouped) != wanted or len(grouped) != len(wanted):
        raise UsageError(f"optimizer {train.optimizer!r} leaves a parameter out or takes one twice")
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group.setdefault("peak_lr", group["lr"])
    return optimizers


def set_rates(optimizers: list[torch.optim.Optimizer], factor: float, peaks: dict[str, float] | None = None) -> float:
    """Sets every group's rate to `factor` of its peak, or of what `peaks` has instead of `train.lr` or `adam_lr`; gives
    the first group's, the one that is logged."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = (peaks or {}).get(group.get("rate", "lr"), group["peak_lr"]) * factor
    return optimizers[0].param_groups[0]["lr"]


@torch.no_grad()
def add_penalties(model: nn.Module, l1: float, l2: float) -> None:
    """Adds the gradient of l2/2 * sum(w^2) + l1 * sum(|w|) over the matrices that decay."""
    if l1 or l2:
        for w in split(model, decays)[0]:
            if w.grad is not None:
                w.grad.add_(w, alpha=l2).add_(w.sign(), alpha=l1)
