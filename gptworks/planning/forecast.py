"""What a fresh model is likely to reach on a text, by its size, the tokens it sees and how often it sees them again.

The law is Hoffmann et al.'s (2022), a sum of what the model is too small for and what it has seen too little for, with
repeated text worth less the more often it was there (Muennighoff et al. 2023). It is told as a share of what counting
tokens reaches, which makes texts of different difficulty alike. Its numbers are fitted to runs of `benchmarks/sizes.py`
on novels, Wikipedia and a Chinese novel (docs/benchmarks.md); beyond the sizes and times there it is a guess.
"""

import math

FLOOR = 0.32  # the share that no size and no text goes below
SIZE, SIZE_POWER = 13.6, 0.336
SEEN, SEEN_POWER = 17.7, 0.290
WORN = 15.0  # passes after which repeated text is worth little more
STEP = 2**0.5  # between the sizes that are compared
SMALLEST, LARGEST = 1e5, 1e12
NARROWEST = 48  # parameters for each id of a vocabulary, of the smallest model that is proposed for it


def share_of_unigrams(parameters: float, tokens: float, epoch_tokens: float) -> float:
    """Bits per byte of a trained model over those of unigrams, the counting of tokens."""
    again = max(tokens / epoch_tokens - 1, 0.0)
    seen = min(tokens, epoch_tokens) * (1 + WORN * (1 - math.exp(-again / WORN)) if again else 1.0)
    return FLOOR + SIZE / parameters**SIZE_POWER + SEEN / seen**SEEN_POWER


def best_parameters(flops: float, epoch_tokens: float, vocab_size: int = 0) -> tuple[float, float]:
    """The parameters for which so many FLOPs of training reach most, and the share of unigrams that they reach."""
    smallest = max(SMALLEST, NARROWEST * vocab_size)
    sizes = [smallest * STEP**n for n in range(math.ceil(math.log(LARGEST / smallest, STEP)))]
    return min((share_of_unigrams(size, flops / (6 * size), epoch_tokens), size) for size in sizes)[::-1]
