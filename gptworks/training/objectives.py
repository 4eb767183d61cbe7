"""The cost of a batch: objectives give sums of losses and the weight to divide by; the loop normalises once."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from gptworks.core.config import Train
from gptworks.data.batch import Batch
from gptworks.model.experts import balance_loss, router_z_loss
from gptworks.model.transformer import Transformer

Figure = tuple[Tensor | float, Tensor | float]  # a sum and the weight to divide it by


@dataclass(frozen=True)
class Loss:
    """The loss of a micro-batch, summed over its targets, and figures that are logged beside it.

    Figures are pairs (sum, weight): both parts are added over micro-batches, workers, processes and logged steps, then
    divided once, so that how a step is cut does not change what is logged.
    """

    sum: Tensor  # scalar, with its graph
    figures: Mapping[str, Figure] = field(default_factory=dict)


class Objective(Protocol):
    """`loss(model, batch).sum / weight(batch)` is the mean loss, in nats.

    `figures` names what each Loss has beside its sum, always the same, so that a process without rows knows it too.
    """

    figures: tuple[str, ...]

    def weight(self, batch: Batch) -> float: ...

    def loss(self, model: Transformer, batch: Batch) -> Loss: ...


class NextToken:
    """Cross-entropy of each next token, weighted by `batch.weights`, with the smoothing and z-loss of `train`.

    With experts, `train.router_aux_loss` and `router_z_loss` are means over the sparse layers. The balance of experts
    is that within a micro-batch: it is a product of two means, and so not the same in larger ones.
    """

    figures: tuple[str, ...] = ()

    def __init__(self, train: Train) -> None:
        self.label_smoothing, self.z_loss = train.label_smoothing, train.z_loss
        self.balance, self.router_z = train.router_aux_loss, train.router_z_loss

    def weight(self, batch: Batch) -> float:
        return float(batch.weights.sum())

    def loss(self, model: Transformer, batch: Batch) -> Loss:
        hidden, routing = model(batch.tokens, segments=batch.segments)
        targets, weights = batch.targets.flatten(), batch.weights.flatten()
        loss = model.head.loss_sum(
            hidden.flatten(0, 1), targets, weights,
            label_smoothing=self.label_smoothing, z_loss=self.z_loss, compiled=model.compiling,
        )  # fmt: skip
        if self.balance or self.router_z:
            for logits in routing:
                balance = balance_loss(logits, model.config.num_experts_per_tok, weights) * weights.sum()
                penalty = self.balance * balance + self.router_z * router_z_loss(logits, weights)
                loss = loss + penalty / len(routing)
        return Loss(loss)
