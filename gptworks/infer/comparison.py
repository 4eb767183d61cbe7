"""Compares how well two models predict a text: the paired difference in bits per byte, with its interval.

The models' tokens may differ, so the text is cut into pairs where no token of either spans. What each model needs for a
pair comes from the losses of one and the same evaluation of the whole text.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist
from typing import Any

import numpy as np

from gptworks.data.shards import Stream
from gptworks.data.text import safe_places
from gptworks.infer.scoring import charge

PAIR_BYTES = 2000  # of text in a pair
FEWEST_PAIRS = 10  # below it the standard error of a ratio is itself too uncertain
STRETCHES = 16  # of neighbouring pairs: where one model does better in a pair, it tends to in the next one too


def cut(documents: list[str]) -> tuple[list[list[int]], np.ndarray]:
    """Positions within each document where a pair may begin, and the bytes of all text up to each of these and to each
    document's end, in order."""
    places = [list(safe_places(document, PAIR_BYTES // 4)) for document in documents]
    sizes = [
        len(document[a:b].encode("utf-8", "replace"))
        for document, within in zip(documents, places, strict=True)
        for a, b in pairwise([0, *within, len(document)])
    ]
    return places, np.cumsum(sizes)


def bits_before(losses: np.ndarray, marks: np.ndarray, stream: Stream | None = None) -> np.ndarray:
    """Bits of all tokens before each mark, a number of tokens; NaN where the mark is -1.

    `losses` are those of a stream's tokens after the first, in nats; `marks` are `shards.encode_documents`'. With the
    stream, what decoding does not give back of its text up to there is charged (see `scoring.charge`).
    """
    running = np.append(0.0, np.cumsum(losses, dtype=np.float64))
    bits = np.where(marks < 0, np.nan, running[np.maximum(marks, 1) - 1] / math.log(2))
    if stream is None or stream.lost_before is None or not stream.lost_bytes:
        return bits
    return bits + charge(running[-1], stream.bytes, stream.lost_bytes) * stream.lost_before


@dataclass(frozen=True)
class Difference:
    """The bits a byte that one model needs more than another; `interval` is None where there are too few pairs."""

    bits_per_byte: float
    interval: tuple[float, float] | None
    pairs: int

    def as_dict(self, one: str, other: str) -> dict[str, Any]:
        """Gives the figures as JSON has them, with the better model's name, or None and the reason."""
        better, reason = None, None
        if self.interval is None:
            reason = f"an interval needs {FEWEST_PAIRS} pairs of {PAIR_BYTES:,} bytes or more"
        elif self.interval[0] <= 0 <= self.interval[1]:
            reason = "no difference shown"
        else:
            better = other if self.bits_per_byte > 0 else one
        return {
            "difference_bits_per_byte": self.bits_per_byte,
            "interval": list(self.interval) if self.interval else None,
            "pairs": self.pairs,
            "better": better,
            "reason": reason,
        }


def compare(bits: np.ndarray, other: np.ndarray, sizes: np.ndarray) -> Difference:
    """The difference in bits per byte, with a 95 % interval for it on other text of the same kind.

    Given, at ascending places of a text of which the last is its end, the bits that each model needs up to there (NaN
    where a token spans the place) and the bytes up to there. With d and x the difference in bits and the bytes, the
    estimate is the ratio R = sum(d) / sum(x). Pairs next to each other are not independent (between two real models
    their residuals d - R x correlate by 0.3), long stretches of them nearly are. So with d and x of each of q equal
    stretches, q = 16 or as many as there are pairs, the standard error is
    sqrt(q / (q - 1) * sum((d - R x)^2)) / sum(x) (Cochran 1977, Sampling Techniques, chapter 6, without the correction
    for a finite population), and the interval R -+ t(0.975, q - 1) standard errors (Ibragimov & Mueller 2010).
    """
    kept = _pairs(np.flatnonzero(~np.isnan(bits + other)), sizes)
    pairs, q = len(kept), min(len(kept), STRETCHES)
    ends = np.array(kept)[np.arange(1, q + 1) * pairs // q - 1]
    d, x = np.diff((bits - other)[ends], prepend=0.0), np.diff(sizes[ends], prepend=0)
    ratio = float(d.sum() / x.sum())
    if pairs < FEWEST_PAIRS:
        return Difference(ratio, None, pairs)
    error = math.sqrt(q / (q - 1) * ((d - ratio * x) ** 2).sum()) / float(x.sum())
    half = student(0.975, q - 1) * error
    return Difference(ratio, (ratio - half, ratio + half), pairs)


def _pairs(places: np.ndarray, sizes: np.ndarray) -> list[int]:
    """The places where pairs end: the first at least PAIR_BYTES after the one before; the last takes what is left."""
    kept, reached = [], 0
    for place in places.tolist():
        if sizes[place] - reached >= PAIR_BYTES:
            kept.append(place)
            reached = sizes[place]
    return [*kept[:-1], len(sizes) - 1]


def student(share: float, freedom: int) -> float:
    """The quantile of Student's t, from that of the normal distribution; within 1e-5 of it from 9 degrees of freedom on
    (Abramowitz & Stegun 1964, 26.7.5)."""
    z, n = NormalDist().inv_cdf(share), freedom
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / n**power for power, term in enumerate(terms, start=1))
