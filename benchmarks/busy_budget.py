"""Whether a time budget holds beside other work: `python benchmarks/busy_budget.py [--seconds 60] [--busy 2]`.

Trains the recipe `laptop` for so many seconds; from half-way on, so many other processes keep the processors busy.
Prints when the model folder was written, as a share of the budget, and the plans that were made. Exit code 1 beyond a
tenth on either side.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from gptworks.core.config import RunFile


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--busy", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, "-m", "gptworks", "train", "laptop", f"train.time_budget_s={options.seconds}"]
        training = subprocess.Popen([*command, "--out", str(out), "--quiet"])
        time.sleep(options.seconds / 2)
        others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(options.busy)]
        try:
            code = training.wait()
        finally:
            for other in others:
                other.kill()
        if code:
            sys.exit(code)
        result = json.loads((out / "result.json").read_text())
        file = RunFile.read(out / "config.yaml")
        share = result["seconds"] / options.seconds
        print(f"written after {result['seconds']:.1f} s, {share:.2f} of the budget, with {options.busy} busy processes")
        print(f"planned {file.chosen.train.max_steps} steps, made {result['steps']}, loss {result['eval']['loss']:.4f}")
        for change in file.changes:
            print(f"  step {change.step}: {change.why}")
    sys.exit(not 0.9 <= share <= 1.1)


if __name__ == "__main__":
    main()
