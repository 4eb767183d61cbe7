"""What a batch costs. An objective gives the sum of losses and the weight to divide by; the loop normalises once."""

from typing import Protocol

from torch import Tensor

from gptworks.core.config import Train
from gptworks.data.loader import Batch
from gptworks.model.experts import balance_loss, router_z_loss
from gptworks.model.kernels import cross_entropy_sum
from gptworks.model.transformer import Transformer


class Objective(Protocol):
    """`loss_sum(model, batch) / weight(batch)` is the mean loss, in nats."""

    def weight(self, batch: Batch) -> float: ...

    def loss_sum(self, model: Transformer, batch: Batch) -> Tensor: ...


class NextToken:
    """Cross-entropy of each next token, weighted by `batch.weights`, with the smoothing and z-loss of `train`.

    With experts, `train.router_aux_loss` and `router_z_loss` are means over the sparse layers. The balance of experts
    is that within a micro-batch: it is a product of two means, and so not the same in larger ones.
    """

    def __init__(self, train: Train) -> None:
        self.label_smoothing, self.z_loss = train.label_smoothing, train.z_loss
        self.balance, self.router_z = train.router_aux_loss, train.router_z_loss

    def weight(self, batch: Batch) -> float:
        return float(batch.weights.sum())

    def loss_sum(self, model: Transformer, batch: Batch) -> Tensor:
        routing: list[Tensor] | None = [] if model.config.num_experts and (self.balance or self.router_z) else None
        hidden = model(batch.tokens, batch.segments, routing=routing).flatten(0, 1)  # [B T, D]
        targets, weights = batch.targets.flatten(), batch.weights.flatten()
        cap = model.config.final_logit_softcapping
        loss = cross_entropy_sum(
            hidden, model.lm_head.weight, targets, weights, self.label_smoothing, self.z_loss, cap, model.compiling
        )
        for logits in routing or []:
            balance = balance_loss(logits, model.config.num_experts_per_tok, weights) * weights.sum()
            each = self.balance * balance + self.router_z * router_z_loss(logits, weights)
            loss = loss + each / len(routing or [])
        return loss
