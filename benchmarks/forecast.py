"""How far what was forecast lies from what runs reached, and the law fitted anew to them.

Takes what `benchmarks/sizes.py --json FILE` wrote, of any number of texts and times. Printed are for each text the
factor by which its runs lie above the law, what is left without it, and the constants of `planning/forecast.py` as
these runs would have them: least squares of the logarithms with a factor for each text, the exponents held near those
of Hoffmann et al. (2022) by a prior.

python benchmarks/forecast.py sizes_60.json sizes_300.json
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from gptworks.planning import forecast

PRIOR = {"SIZE_POWER": (0.34, 0.03), "SEEN_POWER": (0.28, 0.03), "FLOOR": (forecast.FLOOR, 0.05)}  # mean, deviation
CONSTANTS = ("FLOOR", "SIZE", "SIZE_POWER", "SEEN", "SEEN_POWER")
FACTOR = 0.1  # deviation of a text's factor from 1
NOISE = 0.015  # of a run
TRIALS, TINY = 200, 1e-5


def expected(run: dict[str, Any], constants: dict[str, float]) -> float:
    """The logarithm of the bits per byte that the law, with these constants, expects of a run."""
    for name, value in constants.items():
        setattr(forecast, name, value)
    facts = run["facts"]
    text = facts["epoch_tokens"] * facts["bytes_per_token"]
    share = forecast.share_of_counting(run["parameters"], run["tokens"] * facts["bytes_per_token"], text)
    kind = {"vocab_size": facts["vocab_size"], "bytes_per_token": facts["bytes_per_token"]}
    return math.log(forecast.likely_bits(share, facts["unigram_bits"], **kind))


arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
arguments.add_argument("files", nargs="+", type=Path)
runs: list[tuple[str, dict[str, Any]]] = []
for file in arguments.parse_args().files:
    runs += [(name.partition("=")[0], run) for name, run in json.loads(file.read_text())["runs"].items()]
texts = sorted({text for text, _ in runs})
known = {name: getattr(forecast, name) for name in CONSTANTS}


def errors(values: np.ndarray) -> np.ndarray:
    """What is to be small, in deviations: each run's error, and how far constants and factors are from their priors."""
    constants = known | {name: math.exp(value) for name, value in zip(CONSTANTS, values, strict=False)}
    factors = dict(zip(texts, values[len(CONSTANTS) :], strict=True))
    left = [(expected(run, constants) + factors[text] - math.log(run["bits_per_byte"])) / NOISE for text, run in runs]
    held = [(constants[name] - mean) / deviation for name, (mean, deviation) in PRIOR.items()]
    return np.array(left + held + [factor / FACTOR for factor in factors.values()])


def fitted() -> np.ndarray:
    """The least squares, by Levenberg's steps."""
    values = np.array([math.log(known[name]) for name in CONSTANTS] + [0.0] * len(texts))
    here, damping = errors(values), 1.0
    for _ in range(TRIALS):
        slopes = np.stack([(errors(values + TINY * unit) - here) / TINY for unit in np.eye(len(values))], axis=1)
        step = np.linalg.solve(slopes.T @ slopes + damping * np.eye(len(values)), -slopes.T @ here)
        there = errors(values + step)
        if there @ there < here @ here:
            values, here, damping = values + step, there, damping / 3
        else:
            damping *= 4
    return values


found = fitted()
print(f"{len(runs)} runs: the law as it is")
for text in texts:
    own = [math.log(run["bits_per_byte"]) - expected(run, known) for name, run in runs if name == text]
    factor, most = float(np.mean(own)), max(abs(error - np.mean(own)) for error in own)
    print(
        f"  {text}: {math.exp(factor):.3f} times what is expected; beside that at most {most:.1%} off, {len(own)} runs"
    )
left = errors(found)[: len(runs)] * NOISE
print(f"fitted to these runs ({math.sqrt(float(np.mean(left**2))):.1%} off, at most {np.abs(left).max():.1%})")
for name, value in zip(CONSTANTS, np.exp(found), strict=False):
    print(f"  {name} = {value:.3g}, now {known[name]:g}")
