"""A recipe from process start to result: seconds, peak memory, loss.

python benchmarks/recipe.py shakespeare_char --command train
python benchmarks/recipe.py laptop --command run          # what `make demo` does after set-up
"""

import tempfile
from pathlib import Path

from common import gptworks, parser, spread, table, write

arguments = parser(__doc__)
arguments.add_argument("recipe")
arguments.add_argument("overrides", nargs="*")
arguments.add_argument("--command", choices=("run", "train"), default="train")
options = arguments.parse_args()

runs = []
for number in range(options.runs):
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "run")
        done = gptworks(options.command, options.recipe, *options.overrides, "--out", out)
    result = done["result"]
    runs.append(
        {
            "seconds": done["seconds"],
            "peak_bytes": done["peak_bytes"],
            "steps": result["steps"],
            "loss": result["eval"]["loss"],
            "bits_per_byte": result["eval"]["bits_per_byte"],
            "predicted_tokens": result["eval"]["tokens"],
            "tokens_per_second": result["tokens_per_second"],
            "share_of_matmul_rate": result["mfu"],
        }
    )
    print(f"run {number + 1}: {runs[-1]['seconds']:.1f} s, eval loss {runs[-1]['loss']:.4f}", flush=True)

table(
    f"gptworks {options.command} {options.recipe} {' '.join(options.overrides)} — median (range) of {len(runs)}",
    [
        ("whole process, s", spread([r["seconds"] for r in runs], 1)),
        ("peak resident, GB", spread([r["peak_bytes"] / 1e9 for r in runs])),
        ("steps", spread([r["steps"] for r in runs], 0)),
        ("eval loss, nats a token", spread([r["loss"] for r in runs], 4)),
        ("bits per byte", spread([r["bits_per_byte"] for r in runs], 3)),
        ("tokens per second", spread([r["tokens_per_second"] for r in runs], 0)),
        ("share of the matmul rate", spread([r["share_of_matmul_rate"] for r in runs])),
    ],
)
write(options.json, {"recipe": options.recipe, "overrides": options.overrides, "runs": runs})
