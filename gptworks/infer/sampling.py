"""From scores to the next token: repetition penalty, temperature, top-k, top-p, min-p."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gptworks.core.errors import NotFinite, UsageError


@dataclass(frozen=True)
class Sampling:
    """The settings by which tokens are chosen, applied in the order of the fields; temperature 0 takes the
    likeliest."""

    repetition_penalty: float = 1.0  # > 1 lowers the scores of tokens already in the text (Keskar et al. 2019)
    temperature: float = 1.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0  # nucleus (Holtzman et al. 2020)
    min_p: float = 0.0  # keep tokens at least this share as likely as the likeliest
    seed: int | None = None

    def __post_init__(self) -> None:
        checks = (
            (0 <= self.temperature < float("inf"), f"temperature={self.temperature}: must be 0 or more"),
            (self.top_k >= 0, f"top_k={self.top_k}: must be 0 (all) or more"),
            (0 < self.top_p <= 1, f"top_p={self.top_p}: must be above 0, at most 1"),
            (0 <= self.min_p <= 1, f"min_p={self.min_p}: must be between 0 and 1"),
            (
                0 < self.repetition_penalty < float("inf"),
                f"repetition_penalty={self.repetition_penalty}: must be above 0",
            ),
        )
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise UsageError(f"seed={str(self.seed)[:40]}: must be a whole number from 0 to 2^63-1")
        for good, message in checks:
            if not good:
                raise UsageError(message)


def choose(logits: Tensor, seen: Tensor, how: Sampling, generator: torch.Generator) -> int:
    """The next token, given scores [V] and the ids of the text so far. Raises NotFinite."""
    greedy = how.temperature < 1e-6  # 0, or so near it that a division by it would overflow
    if greedy and how.repetition_penalty == 1.0:
        highest = logits.max(0)
        score, token = torch.stack((highest.values.double(), highest.indices.double())).tolist()  # one wait for a GPU
        _check_finite(score)
        return int(token)
    places = None
    if logits.is_cuda and 0 < how.top_k < len(logits) and how.repetition_penalty == 1.0:
        logits, indices = logits.topk(how.top_k)  # the rest has no chance, and would be copied and sorted here
        places = indices.tolist()
    scores = logits.float().cpu()
    _check_finite(float(scores.max()))
    if how.repetition_penalty != 1.0 and len(seen):
        unique = seen.unique()
        values, scores = scores[unique], scores.clone()
        scores[unique] = torch.where(values > 0, values / how.repetition_penalty, values * how.repetition_penalty)
    if greedy:
        return int(scores.argmax())
    scores = (scores - scores.max()) / how.temperature  # the likeliest at 0: no temperature overflows
    if 0 < how.top_k < len(scores):
        scores[scores < scores.topk(how.top_k).values[-1]] = -torch.inf
    probabilities = scores.softmax(-1)
    if how.top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        drop = ordered.cumsum(-1) - ordered >= how.top_p  # those before it already hold top_p
        probabilities[order[drop]] = 0
    if how.min_p > 0:
        probabilities[probabilities < how.min_p * probabilities.max()] = 0
    token = int(torch.multinomial(probabilities, 1, generator=generator))
    return token if places is None else places[token]


def _check_finite(highest: float) -> None:
    if not -math.inf < highest < math.inf:  # nor is it where one is NaN
        raise NotFinite("the model's scores are not finite: its weights are too large, or not what they should be")
