"""`laptop` against the `textbook` baseline at the same time budget: bits per byte of the same held-out text.

Both are evaluated once, at the end, so that neither pays for a curve. A step of textbook is about 10^12 floating-point
operations: a budget that holds too few of them says nothing, or is refused.

python benchmarks/equal_seconds.py --seconds 600 --runs 3
"""

import tempfile

from common import gptworks, parser, spread, table, write

arguments = parser(__doc__)
arguments.add_argument("--seconds", type=float, default=600)
arguments.add_argument("--recipes", nargs="+", default=["laptop", "textbook"])
options = arguments.parse_args()

found: dict[str, list[dict]] = {name: [] for name in options.recipes}
for _ in range(options.runs):
    for name in options.recipes:
        with tempfile.TemporaryDirectory() as folder:
            budget = [f"train.time_budget_s={options.seconds}", "train.eval_every=1000000"]
            done = gptworks("train", name, *budget, "--out", f"{folder}/run")
        found[name].append({"seconds": done["seconds"], **done["result"]["eval"], "steps": done["result"]["steps"]})
        print(name, found[name][-1], flush=True)
rows = []
for name, runs in found.items():
    rows.append((f"{name}, bits per byte", spread([r["bits_per_byte"] for r in runs], 3)))
    rows.append((f"{name}, whole process, s", spread([r["seconds"] for r in runs], 1)))
    rows.append((f"{name}, steps", spread([r["steps"] for r in runs], 0)))
table(f"a budget of {options.seconds:g} s each — median (range) of {options.runs}", rows)
write(options.json, {"budget_s": options.seconds, "runs": found})
