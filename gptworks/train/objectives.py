"""What a batch costs. An objective gives the sum of losses and the weight to divide by; the loop normalises once."""

from typing import Protocol

from torch import Tensor

from gptworks.core.config import Train
from gptworks.data.loader import Batch
from gptworks.model.kernels import cross_entropy_sum
from gptworks.model.transformer import Transformer


class Objective(Protocol):
    """`loss_sum(model, batch) / weight(batch)` is the mean loss, in nats."""

    def weight(self, batch: Batch) -> float: ...

    def loss_sum(self, model: Transformer, batch: Batch) -> Tensor: ...


class NextToken:
    """Cross-entropy of each next token, weighted by `batch.weights`, with the smoothing and z-loss of `train`."""

    def __init__(self, train: Train) -> None:
        self.label_smoothing, self.z_loss = train.label_smoothing, train.z_loss

    def weight(self, batch: Batch) -> float:
        return float(batch.weights.sum())

    def loss_sum(self, model: Transformer, batch: Batch) -> Tensor:
        hidden = model(batch.tokens, batch.segments).flatten(0, 1)  # [B T, D]
        targets, weights = batch.targets.flatten(), batch.weights.flatten()
        cap = model.config.final_logit_softcapping
        return cross_entropy_sum(hidden, model.lm_head.weight, targets, weights, self.label_smoothing, self.z_loss, cap)
