"""How a time budget holds on a machine whose pace wanders: `python benchmarks/wandering_budget.py`.

The clock is passed in, as in the tests of the budget, so 360 runs of 1,000 s take a few seconds. The logarithm of the
pace is an AR(1) of some strength, correlated over some seconds; 20 seeds for each setting. A run is outside where its
model is written before 0.9 or after 1.1 of the budget.
"""

import math
import random
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "training")]

from test_hooks import BUDGET, live  # noqa: E402

from gptworks.core.log import console  # noqa: E402


def pace(seed: int, strength: float, lasting: float) -> list[float]:
    """How slow each second is, 1 on the way between slow and fast."""
    draw, level, seconds = random.Random(seed), 0.0, []
    for _ in range(20 * int(BUDGET)):
        level = level * math.exp(-1 / lasting) + math.sqrt(1 - math.exp(-2 / lasting)) * draw.gauss(0, 1)
        seconds.append(math.exp(strength * level))
    return seconds


def main() -> None:
    console.quiet = True
    total = 0
    print("step  strength  lasting  end of the budget (least, median, most)  outside  plans (median, most)")
    for step in (1.0, 5.0, 15.0):
        for strength in (0.3, 0.6):
            for lasting in (5, 30, 200):
                runs = [live(step=step, evaluation=19.0, pace=pace(seed, strength, lasting)) for seed in range(20)]
                ends = sorted(run.end / BUDGET for run in runs)
                plans = sorted(len(run.schedule.changes) for run in runs)
                outside = sum(not 0.9 <= end <= 1.1 for end in ends)
                total += outside
                print(
                    f"{step:4.0f}  {strength:8.1f}  {lasting:7}  "
                    f"{ends[0]:.2f} {statistics.median(ends):.2f} {ends[-1]:.2f}"
                    f"{outside:31}  {statistics.median(plans):13.0f} {plans[-1]:4}"
                )
    print(f"{total} of 360 outside")


if __name__ == "__main__":
    main()
