"""What stands on the decoder: from hidden states to scores, to a loss, to log-probabilities.

Shapes: N rows, D width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from gptworks.model.config import ModelConfig
from gptworks.model.kernels import cross_entropy, cross_entropy_sum, softcap
from gptworks.model.linear import Linear


class LanguageHead(Linear):
    """Scores over the vocabulary, of which the likeliest is the next token. Where embeddings are tied its matrix is
    theirs."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.hidden_size, config.vocab_size, bias=False)
        self.cap = config.final_logit_softcapping

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores [..., V] of hidden states [..., D]."""
        return softcap(self(hidden), self.cap)

    def log_probabilities(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """log p(target) of each row, [N] in float32, of hidden states [N, D] and targets [N]."""
        if torch.is_grad_enabled():
            return -F.cross_entropy(self.logits(hidden).float(), targets, reduction="none")
        return -cross_entropy(hidden, self.weight, targets=targets, cap=self.cap)

    def loss_sum(
        self,
        hidden: Tensor,
        targets: Tensor,
        weights: Tensor,
        *,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        compiled: bool = False,
    ) -> Tensor:
        """The weighted sum of the rows' cross-entropies, a scalar in float32: hidden [N, D], targets and weights [N].

        `compiled` has the compiler make what is done with the scores; the products stay as they are.
        """
        return cross_entropy_sum(
            hidden,
            self.weight,
            targets=targets,
            weights=weights,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            cap=self.cap,
            compiled=compiled,
        )
