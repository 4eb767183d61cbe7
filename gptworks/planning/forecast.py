"""What a fresh model is likely to reach on a text, by its size, the text it sees and how often it sees that again.

The law is Hoffmann et al.'s (2022), a sum of what the model is too small for and what it has seen too little for, with
repeated text worth less the more often it was there (Muennighoff et al. 2023). It is told in shares of what counting
tokens reaches with a vocabulary of 4,096, which makes texts of different difficulty, and vocabularies, alike. Its
numbers are fitted to 59 runs on four texts (docs/log.md): they are met within a few hundredths, the text's own share
aside; beyond the sizes and times there it is a guess.
"""

import math
from collections.abc import Callable

FLOOR = 0.425  # the share that no size and no text goes below
SIZE, SIZE_POWER = 10.0, 0.343
SEEN, SEEN_POWER = 20.5, 0.303  # of bytes
WORN = 15.0  # passes after which repeated text is worth little more
VOCABULARY, VOCABULARY_POWER = 4096, 0.1  # how much less counting leaves of a text where tokens are longer
STEP = 2**0.5  # between the sizes that are compared
SMALLEST, LARGEST = 1e5, 1e12
NARROWEST = 48  # parameters for each id of a vocabulary, of the smallest model that is proposed for it


def share_of_counting(parameters: float, seen: float, text: float) -> float:
    """The bits per byte of a trained model over what counting leaves; `seen` and `text` are bytes, the latter of one
    pass."""
    again = max(seen / text - 1, 0.0)
    worth = min(seen, text) * (1 + WORN * (1 - math.exp(-again / WORN)) if again else 1.0)
    return FLOOR + SIZE / parameters**SIZE_POWER + SEEN / max(worth, 1.0) ** SEEN_POWER


def likely_bits(share: float, unigram_bits: float, vocab_size: int, bytes_per_token: float) -> float:
    """Bits per byte from a share, and what counting leaves with a vocabulary; at most those of an untrained model, to
    which all tokens are alike."""
    counting = unigram_bits * (vocab_size / VOCABULARY) ** VOCABULARY_POWER
    return min(share * counting, math.log2(max(vocab_size, 2)) / bytes_per_token)


def best_parameters(
    seen: Callable[[float], float], text: float, vocab_size: int, most: float = LARGEST
) -> tuple[float, float]:
    """The number of parameters, `most` at most, that is likely to reach most, and its share; `seen` gives the bytes
    that a size would see, `text` are those of one pass."""
    smallest = max(SMALLEST, NARROWEST * vocab_size)
    sizes = [smallest * STEP**n for n in range(max(math.ceil(math.log(most / smallest, STEP)), 1))]
    return min((share_of_counting(size, seen(size), text), size) for size in sizes)[::-1]
