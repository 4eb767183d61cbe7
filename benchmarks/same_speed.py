"""Whether two versions of gptworks are equally fast: `python benchmarks/same_speed.py OLD [NEW] [--pairs 7]`.

Each row is run by both versions in alternation, and the ratio is taken pair by pair, so that a machine that changes its
pace moves both. NEW is the working tree where it is left out. Nothing else may run meanwhile.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from same_bits import tree_of

RECIPES = {"shakespeare_char": 200, "laptop": 60}  # steps, of a quarter of a minute
SIZES = {"1M": 8, "10M": 3}


def run(tree: Path, arguments: list[str]) -> None:
    """Runs Python with that tree's package. Raises SystemExit with what it printed where it fails."""
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    done = subprocess.run([sys.executable, *arguments], cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(arguments)}: exit code {done.returncode}\n{done.stderr[-3000:]}")


def tokens_per_second(tree: Path, name: str) -> float:
    """The pace of a recipe's training, or of the steps of a model of that size."""
    with tempfile.TemporaryDirectory() as folder:
        if name in RECIPES:
            out, steps = Path(folder) / "run", RECIPES[name]
            limits = [f"train.{key}={steps}" for key in ("max_steps", "eval_every", "checkpoint_every")]
            settings = ["train.time_budget_s=null", "train.tensorboard=false", *limits]
            run(tree, ["-m", "gptworks", "train", name, *settings, "--out", str(out), "--quiet"])
            return float(json.loads((out / "result.json").read_text())["tokens_per_second"])
        figures = Path(folder) / "figures.json"
        options = ["--contexts", "256", "--who", "ours", "--runs", "1", "--steps", str(SIZES[name])]
        run(tree, ["benchmarks/train_speed.py", "--sizes", name, *options, "--json", str(figures)])
        (row,) = json.loads(figures.read_text())["rows"]
        return float(row["runs"][0]["tokens_per_second"])


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("old", help="a commit")
    made.add_argument("new", nargs="?", help="a commit; left out: the working tree")
    made.add_argument("--pairs", type=int, default=7)
    made.add_argument("--only", nargs="+", choices=[*RECIPES, *SIZES], default=[*RECIPES, *SIZES])
    options = made.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trees = [tree_of(commit, Path(folder)) for commit in (options.old, options.new)]
        for name in options.only:
            pairs = []
            for number in range(options.pairs):
                order = trees if number % 2 == 0 else trees[::-1]
                found = {tree: tokens_per_second(tree, name) for tree in order}
                pairs.append([found[tree] for tree in trees])
            before, after = (statistics.median(column) for column in zip(*pairs, strict=True))
            ratios = sorted(new / old for old, new in pairs)
            print(f"{name:<18} {before:>9,.0f} {after:>9,.0f} tokens/s  new over old "
                  f"{statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
