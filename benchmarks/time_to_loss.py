"""`gptworks train shakespeare_char` against nanoGPT's CPU settings as a plain loop: whole processes, pair by pair.

python benchmarks/time_to_loss.py --pairs 5
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import child, gptworks, parser, spread, table, write

arguments = parser(__doc__)
arguments.add_argument("--pairs", dest="runs", type=int, help="another name for --runs")
arguments.add_argument("--steps", default="2000", help="of the baseline")
arguments.add_argument("overrides", nargs="*", help="for our recipe")
options = arguments.parse_args()
baseline = str(Path(__file__).parent / "baselines" / "nanogpt_cpu.py")


def theirs() -> dict[str, Any]:
    return child([sys.executable, baseline, options.steps])


def ours() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        return gptworks("train", "shakespeare_char", *options.overrides, "--out", f"{folder}/run")


pairs = []
for number in range(options.runs):
    done = {turn: turn() for turn in ((ours, theirs) if number % 2 else (theirs, ours))}
    pairs.append(
        {
            "ours_s": done[ours]["seconds"],
            "ours_loss": done[ours]["result"]["eval"]["loss"],
            "theirs_s": done[theirs]["seconds"],
            "theirs_loss": json.loads(done[theirs]["stdout"])["loss"],
        }
    )
    print(f"pair {number + 1}: {pairs[-1]}", flush=True)
ratios = [p["theirs_s"] / p["ours_s"] for p in pairs]
better = all(p["ours_loss"] <= p["theirs_loss"] for p in pairs)
table(
    f"whole process to the exact validation loss — median (range) of {len(pairs)} pairs",
    [
        ("gptworks train shakespeare_char, s", spread([p["ours_s"] for p in pairs], 1)),
        ("its loss, nats a character", spread([p["ours_loss"] for p in pairs], 4)),
        ("nanoGPT's CPU settings, s", spread([p["theirs_s"] for p in pairs], 1)),
        ("its loss", spread([p["theirs_loss"] for p in pairs], 4)),
        ("times faster, pair by pair", spread(ratios) if better else "nothing: its loss is higher"),
    ],
)
write(options.json, {"pairs": pairs})
