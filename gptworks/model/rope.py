"""Rotary positions (Su et al. 2021): the angle by which each pair of channels turns with each place, and the scalings
of it that let published models read further than they were first trained to."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Numbers = dict[str, Any]  # what config.json says of a scaling: `rope_type` and its numbers


def rotary_table(
    positions: Tensor, channels: int, theta: float, scaling: Numbers | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines [..., T, 1, C/2] of the rotary angles of positions [..., T], for C turned channels.

    `scaling` is what `checked` gave.
    """
    frequencies = 1.0 / theta ** (torch.arange(0, channels, 2, device=positions.device).float() / channels)
    factor = 1.0
    if scaling:
        frequencies, factor = SCALINGS[scaling["rope_type"]].apply(frequencies, theta, scaling)
    angles = positions.float()[..., None, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    return (cos, sin) if factor == 1 else (cos * factor, sin * factor)


@dataclass(frozen=True)
class Scaling:
    """The numbers that a kind of scaling needs and may have, and what it makes of the frequencies [C/2] and theta:
    other frequencies, and a factor on cosines and sines."""

    needs: tuple[str, ...]
    may_have: tuple[str, ...]
    apply: Callable[[Tensor, float, Numbers], tuple[Tensor, float]]


def _linear(frequencies: Tensor, theta: float, scaling: Numbers) -> tuple[Tensor, float]:
    """Places closer together (Chen et al. 2023)."""
    return frequencies / scaling["factor"], 1.0


def _dynamic(frequencies: Tensor, theta: float, scaling: Numbers) -> tuple[Tensor, float]:
    """A base that grows with a sequence longer than max_position_embeddings. No sequence is longer here."""
    return frequencies, 1.0


def _llama3(frequencies: Tensor, theta: float, scaling: Numbers) -> tuple[Tensor, float]:
    """Slow channels divided by the factor, quick ones left, and a ramp between (Grattafiori et al. 2024, section 3.4.2;
    its numbers are those of the published code)."""
    turns = frequencies * (scaling["original_max_position_embeddings"] / (2 * math.pi))  # over the first context
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling["factor"]), 1.0


def _yarn(frequencies: Tensor, theta: float, scaling: Numbers) -> tuple[Tensor, float]:
    """Like llama3, with a ramp over the channels, and sharper attention (Peng et al. 2023, sections 3.2 and 3.4)."""
    pairs, factor = len(frequencies), scaling["factor"]

    def channel(turns: float) -> float:  # which makes so many turns over the first context
        return pairs * math.log(scaling["original_max_position_embeddings"] / (turns * 2 * math.pi)) / math.log(theta)

    low, high = channel(scaling.get("beta_fast", 32)), channel(scaling.get("beta_slow", 1))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * pairs - 1)
    ramp = (torch.arange(pairs, device=frequencies.device) - low) / (high - low if high != low else 0.001)
    scaled = ramp.clamp(0, 1)

    def sharpness(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

    attention = scaling.get("attention_factor")
    if attention is None:
        attention = sharpness(1)
        if "mscale" in scaling and "mscale_all_dim" in scaling:
            attention = sharpness(scaling["mscale"]) / sharpness(scaling["mscale_all_dim"])
    return frequencies * (1 - scaled + scaled / factor), attention


SCALINGS = {
    "linear": Scaling(("factor",), (), _linear),
    "dynamic": Scaling(("factor",), (), _dynamic),
    "llama3": Scaling(
        ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), (), _llama3
    ),
    "yarn": Scaling(
        ("factor", "original_max_position_embeddings"),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
        _yarn,
    ),
}


def checked(scaling: Numbers, theta: float, length: int) -> Numbers:
    """The scaling that config.json's `rope_parameters` or `rope_scaling` asks for; {} for none.

    The first context, where it is left out, is `length`, as in transformers. Raises ValueError for a kind or a number
    that we do not know.
    """
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    apart = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
    numbers = {name: value for name, value in scaling.items() if name not in apart and value is not None}
    if kind != "default" and kind not in SCALINGS:
        raise ValueError(
            f"scales rotary positions ({kind}) in a way this version does not; known: {', '.join(SCALINGS)}"
        )
    needs, may_have = (SCALINGS[kind].needs, SCALINGS[kind].may_have) if kind in SCALINGS else ((), ())
    if "original_max_position_embeddings" in needs:
        numbers.setdefault("original_max_position_embeddings", length)
    for name in sorted(numbers.keys() - {*needs, *may_have}):
        raise ValueError(f"{name} is no number of {kind} rotary positions")
    for name in needs:
        if name not in numbers:
            raise ValueError(f"{kind} rotary positions lack {name}")
    for name, value in numbers.items():
        if name == "truncate":
            if not isinstance(value, bool):
                raise ValueError(f"{kind} rotary positions have truncate {value!r}; it must be true or false")
        elif type(value) not in (int, float) or not 0 < value < 1e12:
            raise ValueError(f"{kind} rotary positions have {name} {str(value)[:80]}; it must be a number above 0")
    if kind == "llama3" and numbers["high_freq_factor"] <= numbers["low_freq_factor"]:
        raise ValueError("llama3 rotary positions have a high_freq_factor that is not above low_freq_factor")
    if kind == "yarn" and theta <= 1:
        raise ValueError(f"yarn rotary positions need a rope_theta above 1, not {theta}")
    return {"rope_type": kind, **numbers} if kind in SCALINGS else {}
