"""What a batch costs. An objective gives the sum of losses and the weight to divide by; the loop normalises once."""

from typing import Protocol

from torch import Tensor

from gptworks.data.loader import Batch
from gptworks.infer.scoring import token_losses
from gptworks.model.transformer import Transformer


class Objective(Protocol):
    """`loss_sum(model, batch) / weight(batch)` is the mean loss, in nats."""

    def weight(self, batch: Batch) -> float: ...

    def loss_sum(self, model: Transformer, batch: Batch) -> Tensor: ...


class NextToken:
    """Cross-entropy of each next token, weighted by `batch.weights`."""

    def weight(self, batch: Batch) -> float:
        return float(batch.weights.sum())

    def loss_sum(self, model: Transformer, batch: Batch) -> Tensor:
        return (token_losses(model, batch) * batch.weights).sum()
