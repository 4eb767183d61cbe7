"""Recipes, or two versions of gptworks, at the same time budget: bits per byte of the same held-out text.

Runs take turns. All are evaluated once, at the end, so that none pays for a curve. A step of textbook is about 10^12
floating-point operations: a budget that holds too few of them says nothing, or is refused. Settings follow a recipe
after commas.

python benchmarks/equal_seconds.py laptop textbook --seconds 600 --runs 3
python benchmarks/equal_seconds.py laptop cpu_5min,data.train=wiki.txt --seconds 120 --versions a9af077 HEAD
"""

import tempfile
from pathlib import Path

from common import gptworks, parser, spread, table, write
from same_bits import tree_of

arguments = parser(__doc__)
arguments.add_argument("recipes", nargs="*", default=["laptop", "textbook"])
arguments.add_argument("--seconds", type=float, default=600)
arguments.add_argument("--versions", nargs="+", default=[], help="commits; left out: the working tree")
options = arguments.parse_args()

found: dict[str, list[dict]] = {}
with tempfile.TemporaryDirectory() as trees:
    versions = {commit: tree_of(commit, Path(trees)) for commit in options.versions} or {"": None}
    for number in range(options.runs):
        for recipe in options.recipes:
            for commit in list(versions)[:: -1 if number % 2 else 1]:
                with tempfile.TemporaryDirectory() as folder:
                    budget = [f"train.time_budget_s={options.seconds}", "train.eval_every=1000000"]
                    asked = [*recipe.split(","), *budget, "--out", f"{folder}/run"]
                    done = gptworks("train", *asked, tree=versions[commit])
                name = f"{recipe.partition(',')[0]} {commit}".strip()
                result = {"seconds": done["seconds"], **done["result"]["eval"], "steps": done["result"]["steps"]}
                found.setdefault(name, []).append(result)
                print(name, result, flush=True)
rows = []
for name, runs in found.items():
    rows.append((f"{name}, bits per byte", spread([r["bits_per_byte"] for r in runs], 3)))
    rows.append((f"{name}, whole process, s", spread([r["seconds"] for r in runs], 1)))
    rows.append((f"{name}, steps", spread([r["steps"] for r in runs], 0)))
table(f"a budget of {options.seconds:g} s each — median (range) of {options.runs}", rows)
write(options.json, {"budget_s": options.seconds, "runs": found})
