"""What a batch costs. An objective gives the sum of losses and the weight to divide by; the loop normalises once."""

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from gptworks.core.config import Train
from gptworks.data.loader import Batch
from gptworks.model.transformer import Transformer


class Objective(Protocol):
    """`loss_sum(model, batch) / weight(batch)` is the mean loss, in nats."""

    def weight(self, batch: Batch) -> float: ...

    def loss_sum(self, model: Transformer, batch: Batch) -> Tensor: ...


class NextToken:
    """Cross-entropy of each next token, weighted by `batch.weights`; in training only, as `train` asks, with smoothed
    targets (Szegedy et al. 2016, section 7) and a z-loss (Chowdhery et al. 2022, section 5)."""

    def __init__(self, train: Train) -> None:
        self.label_smoothing, self.z_loss = train.label_smoothing, train.z_loss

    def weight(self, batch: Batch) -> float:
        return float(batch.weights.sum())

    def loss_sum(self, model: Transformer, batch: Batch) -> Tensor:
        logits = model.logits(model(batch.tokens, batch.segments)).float().flatten(0, 1)  # [B T, V]
        losses = F.cross_entropy(
            logits, batch.targets.flatten(), reduction="none", label_smoothing=self.label_smoothing
        )
        if self.z_loss:
            losses = losses + self.z_loss * logits.logsumexp(-1).square()
        return (losses * batch.weights.flatten()).sum()
