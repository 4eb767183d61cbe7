"""Optimizers.

AdamW and Adam are torch's fused step. Muon is ours: momentum, then about the nearest semi-orthogonal matrix, computed
for all matrices of one shape at once, and by several processes each for its share of them.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from gptworks.core.config import Train
from gptworks.core.errors import UsageError
from gptworks.core.ranks import ranks
from gptworks.core.registry import resolve
from gptworks.core.workers import ONE, Workers

OPTIMIZERS = {
    "muon": "gptworks.training.optim:make_muon",
    "adamw": "gptworks.training.optim:make_adamw",
    "adam": "gptworks.training.optim:make_adam",
    "sgd": "gptworks.training.optim:make_sgd",
}
Group = dict[str, Any]

# -- groups: what decays, what Muon takes ------------------------------------------------------------------------


def is_matrix(name: str, parameter: Tensor) -> bool:
    """A matrix inside a block, or one for each expert: what Muon turns. A router's rows are no such matrix: which
    expert is chosen hangs on their sizes."""
    return parameter.ndim >= 2 and "layers." in name and not name.endswith(".mlp.gate.weight")


def decays(name: str, parameter: Tensor) -> bool:
    """Matrices decay; biases, norms and position tables do not."""
    return parameter.ndim >= 2 and "embed_positions" not in name


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


class Optimizer:
    """Groups of parameters with their settings, and a state for each parameter. (torch's own class would load the
    compiler, seconds of a short run.)"""

    def __init__(self, groups: list[Group], **defaults: Any) -> None:
        self.param_groups: list[Group] = [{"lr": 0.0, "weight_decay": 0.0, **defaults, **group} for group in groups]
        self.state: defaultdict[Tensor, dict[str, Tensor]] = defaultdict(dict)

    @torch.no_grad()
    def step(self, workers: Workers = ONE) -> None:
        """Moves every parameter that has a gradient; the workers share the parameters out among them."""
        for group in self.param_groups:
            if moved := [p for p in group["params"] if p.grad is not None]:
                for w in moved:
                    self.state[w]  # made here, or their order would be that of threads
                self.move(moved, [p.grad for p in moved], group=group, workers=workers)

    def move(self, weights: list[Tensor], gradients: list[Tensor], group: Group, workers: Workers) -> None:
        workers.share(partial(self.update, group=group), weights, gradients)

    def update(self, weights: list[Tensor], gradients: list[Tensor], group: Group) -> None:
        """Moves some of a group's weights, each by its own gradient and state alone."""
        raise NotImplementedError

    def velocities(self, weights: list[Tensor]) -> list[Tensor]:
        """The momentum buffers of the weights, zero at first."""
        for w in weights:
            if "momentum" not in self.state[w]:
                self.state[w]["momentum"] = torch.zeros_like(w)
        return [self.state[w]["momentum"] for w in weights]


class AdamW(Optimizer):
    """Adam with decoupled weight decay (Kingma and Ba 2015; Loshchilov and Hutter 2019), torch's fused step."""

    def __init__(self, groups: list[Group], betas: tuple[float, float], eps: float = 1e-8) -> None:
        super().__init__(groups, betas=betas, eps=eps)

    def update(self, weights: list[Tensor], gradients: list[Tensor], group: Group) -> None:
        for w in weights:
            if not self.state[w]:
                zeros = {"exp_avg": torch.zeros_like(w), "exp_avg_sq": torch.zeros_like(w)}
                self.state[w] = {"step": torch.zeros((), device=w.device), **zeros}
        steps, means, squares = ([self.state[w][name] for w in weights] for name in ("step", "exp_avg", "exp_avg_sq"))
        (beta1, beta2), lr, decay = group["betas"], group["lr"], group["weight_decay"]
        adamw(
            weights, gradients, means, squares, [], steps, fused=True, amsgrad=False, maximize=False,
            beta1=beta1, beta2=beta2, lr=lr, weight_decay=decay, eps=group["eps"],
        )  # fmt: skip


class SGD(Optimizer):
    """v = momentum v + g; w -= lr (g + momentum v) with Nesterov's look-ahead, lr v without; decay shrinks w first."""

    def __init__(self, groups: list[Group], momentum: float, nesterov: bool) -> None:
        super().__init__(groups, momentum=momentum, nesterov=nesterov)

    def update(self, weights: list[Tensor], gradients: list[Tensor], group: Group) -> None:
        lr, momentum = group["lr"], group["momentum"]
        torch._foreach_mul_(weights, 1 - lr * group["weight_decay"])
        if momentum:
            velocities = self.velocities(weights)
            torch._foreach_mul_(velocities, momentum)
            torch._foreach_add_(velocities, gradients)
            ahead = torch._foreach_add(gradients, velocities, alpha=momentum) if group["nesterov"] else velocities
            gradients = list(ahead)
        torch._foreach_add_(weights, gradients, alpha=-lr)


class Muon(Optimizer):
    """Momentum orthogonalised by products (Jordan et al. 2024), batched over all matrices of a shape.

    v = momentum v + (1 - momentum) g; update = lr * sqrt(max(1, rows/columns)) * orthogonal(g, v); decay is decoupled.
    """

    def __init__(self, groups: list[Group], momentum: float, nesterov: bool) -> None:
        super().__init__(groups, momentum=momentum, nesterov=nesterov)

    def move(self, weights: list[Tensor], gradients: list[Tensor], group: Group, workers: Workers) -> None:
        updates = [u for part in workers.share(partial(self._updates, group=group), weights, gradients) for u in part]
        shapes: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
        for w, update in _matrices(weights, updates):
            shapes.setdefault((max(w.shape), min(w.shape)), []).append((w, update))
        for pairs in shapes.values():
            wide = [u if u.shape[0] <= u.shape[1] else u.T for _, u in pairs]
            turned = ranks.map_split(partial(_turned, workers=workers), torch.stack(wide))  # [N, rows <= columns]
            workers.share(partial(_add, lr=group["lr"]), [w for w, _ in pairs], list(turned))

    def _updates(self, weights: list[Tensor], gradients: list[Tensor], group: Group) -> list[Tensor]:
        """Lets the weights decay; gives their momentum, which is to be turned."""
        momentum, velocities = group["momentum"], self.velocities(weights)
        torch._foreach_lerp_(velocities, gradients, 1 - momentum)
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        return list(torch._foreach_lerp(gradients, velocities, momentum)) if group["nesterov"] else velocities


def _turned(wide: Tensor, workers: Workers) -> Tensor:
    """The polar factor of each matrix of a stack, of which each worker computes a part."""
    if workers.count == 1:
        return orthogonalise(wide)
    return torch.cat(list(workers.map(orthogonalise, wide.tensor_split(min(workers.count, len(wide))))))


def _add(weights: list[Tensor], turned: list[Tensor], lr: float) -> None:
    """Moves matrices by their turned momentum, wide as it is."""
    for w, t in zip(weights, turned, strict=True):
        rows, columns = w.shape
        w.add_(t if rows <= columns else t.T, alpha=-lr * math.sqrt(max(1.0, rows / columns)))


def _matrices(weights: Sequence[Tensor], updates: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of matrices; of experts [E, rows, columns] one for each."""
    for w, update in zip(weights, updates, strict=True):
        yield from zip(w, update, strict=True) if w.ndim == 3 else [(w, update)]


# p(s) = a s + b s^3 + c s^5, one after another, each the best for what the one before leaves: in four they bring
# singular values from 0.003 to 1 within 0.21 of 1 (Polar Express, Amsel et al. 2025); rounded to bf16, within 0.36.
QUINTICS = (
    (8.2191, -23.4020, 17.1582),
    (4.0049, -2.9223, 0.5491),
    (3.5236, -2.6398, 0.5272),
    (2.5115, -1.8524, 0.4388),
)


@torch.no_grad()  # holds for a thread
def orthogonalise(x: Tensor) -> Tensor:
    """About the polar factor of each matrix of x [N, rows, columns], rows <= columns: singular values near 1.

    In bf16 on a GPU, where matrices multiply faster so; a singular value is at most 1 with room for its rounding.
    """
    out = x.dtype
    x = x.bfloat16() if x.is_cuda else x
    x = x / (1.01 * x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in QUINTICS:
        gram = x @ x.mT
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, poly, x, beta=a)
    return x.to(out)


# -- by name -----------------------------------------------------------------------------------------------------


def make_adamw(model: nn.Module, train: Train) -> list[Optimizer]:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019)."""
    return [AdamW(_decay_groups(model, train, _rate(train)), train.betas)]


def make_adam(model: nn.Module, train: Train) -> list[Optimizer]:
    """Adam (Kingma and Ba 2015); `train.weight_decay`, if set, is decoupled here too, and `train.l2` is its own L2."""
    return make_adamw(model, train)


def make_sgd(model: nn.Module, train: Train) -> list[Optimizer]:
    """Gradient descent, with momentum and Nesterov's look-ahead as set; decay is decoupled."""
    return [SGD(_decay_groups(model, train, _rate(train)), train.momentum or 0.0, train.nesterov)]


def make_muon(model: nn.Module, train: Train) -> list[Optimizer]:
    """Muon for the matrices of the blocks, AdamW for embeddings, head, norms and biases (Jordan et al. 2024)."""
    matrices, rest = split(model, is_matrix)
    if not matrices:
        raise UsageError("train.optimizer=muon needs matrices inside blocks; use adamw for this model")
    lr, adam_lr = _rate(train), train.adam_lr if train.adam_lr is not None else _rate(train)
    momentum = train.momentum if train.momentum is not None else 0.95
    turned = {"params": matrices, "lr": lr, "peak_lr": lr, "weight_decay": train.weight_decay or 0.0}
    muon = Muon([turned], momentum, train.nesterov)
    group = {"params": rest, "lr": adam_lr, "peak_lr": adam_lr, "rate": "adam_lr", "weight_decay": 0.0}
    return [muon, AdamW([group], train.betas)]


def _rate(train: Train) -> float:
    assert train.lr is not None, "the dial sets this"
    return train.lr


def make_optimizers(model: nn.Module, train: Train) -> list[Optimizer]:
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


def set_rates(optimizers: list[Optimizer], factor: float, peaks: dict[str, float] | None = None) -> float:
    """Sets every group's rate to `factor` of its peak, or of what `peaks` has instead of `train.lr` or `adam_lr`; gives
    the first group's, the one that is logged."""
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        name = group.get("rate", "lr")
        group["lr"] = factor * (peaks[name] if peaks and name in peaks else group["peak_lr"])
    return float(optimizers[0].param_groups[0]["lr"])


@torch.no_grad()
def add_penalties(model: nn.Module, l1: float, l2: float) -> None:
    """Adds the gradient of l2/2 * sum(w^2) + l1 * sum(|w|) over the matrices that decay."""
    if l1 or l2:
        for w in split(model, decays)[0]:
            if w.grad is not None:
                w.grad.add_(w, alpha=l2).add_(w.sign(), alpha=l1)
