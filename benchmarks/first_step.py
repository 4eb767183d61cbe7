"""Seconds from the command to the end of a run's first step: imports, tokenizer, shards, model, everything.

python benchmarks/first_step.py shakespeare_char
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import parser, spread, table, write

arguments = parser(__doc__ or "")
arguments.add_argument("recipe", nargs="?", default="shakespeare_char")
arguments.add_argument("overrides", nargs="*")
options = arguments.parse_args()


def once() -> float:
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        with subprocess.Popen(
            [sys.executable, "-m", "gptworks", "train", options.recipe, "train.max_steps=2", "train.log_every=1",
             "train.compile=false", *options.overrides, "--out", str(Path(folder) / "run")],
            env={**os.environ, "NO_COLOR": "1"}, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        ) as process:  # fmt: skip
            assert process.stderr
            lines = []
            for line in process.stderr:
                lines.append(line)
                if line.startswith("step"):
                    seconds = time.perf_counter() - start
                    process.communicate()
                    return seconds
    sys.exit("no step was seen:\n" + "".join(lines))


times = [once() for _ in range(options.runs)]
shown = f"from command to first step, {options.recipe} {' '.join(options.overrides)}".strip()
table(f"{shown} — median (range) of {options.runs}", [("seconds", spread(times))])
write(options.json, {"recipe": options.recipe, "overrides": options.overrides, "seconds": times})
