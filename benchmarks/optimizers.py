"""Steps and seconds to a loss on character-level Shakespeare: SGD, Adam, AdamW and Muon, each with its best rate.

Every optimizer trains the model of `shakespeare_char` at a constant rate after a warm-up of 30 steps. The rate is
chosen among `RATES` with the first seed, the best being the one that gets there in the fewest steps; then all seeds are
run with it. The loss is exact, over the whole validation split, every 25 steps; evaluation is not in the seconds.

python benchmarks/optimizers.py --target 2.1 --json optimizers.json
"""

import tempfile

from common import gptworks, parser, spread, write

RATES = {
    "sgd": (0.03, 0.1, 0.3),
    "adam": (0.002, 0.004, 0.008),
    "adamw": (0.002, 0.004, 0.008),
    "muon": (0.01, 0.02, 0.04),
}
arguments = parser(__doc__ or "")
arguments.add_argument("optimizers", nargs="*", choices=[*RATES, []], help="default: all")
arguments.add_argument("--target", type=float, default=2.1, help="nats a character")
arguments.add_argument("--most", type=int, default=1500, help="steps to give up after")
arguments.add_argument("--seeds", dest="runs", type=int, help="another name for --runs")
arguments.set_defaults(runs=3)
options = arguments.parse_args()


def attempt(optimizer: str, rate: float, seed: int) -> dict[str, float | bool]:
    momentum = 0.9 if optimizer in ("sgd", "muon") else "null"
    with tempfile.TemporaryDirectory() as folder:
        result = gptworks(
            "train", "shakespeare_char", f"train.optimizer={optimizer}", f"train.lr={rate}", "train.schedule=constant",
            f"train.max_steps={options.most}", f"train.target_loss={options.target}", "train.eval_every=25",
            f"train.warmup={30 / options.most}",
            f"train.seed={seed}", f"train.momentum={momentum}", "train.tensorboard=false", "--out", folder + "/run",
        )["result"]  # fmt: skip
    reached = result["eval"]["loss"] <= options.target
    found = {"steps": result["steps"], "seconds": result["train_seconds"], "loss": result["eval"]["loss"]}
    shown = f"{found['steps']} steps, {found['seconds']:.1f} s" if reached else f"not reached: {found['loss']:.3f}"
    print(f"{optimizer:<6} lr {rate:<6} seed {seed}: {shown}", flush=True)
    return {"rate": rate, "seed": seed, "reached": reached, **found}


rows = {}
for name in options.optimizers or RATES:
    first = [attempt(name, rate, 1) for rate in RATES[name]]
    best = min(first, key=lambda run: (not run["reached"], run["steps"], run["loss"]))
    rows[name] = [best, *(attempt(name, best["rate"], seed) for seed in range(2, options.runs + 1))]
print(f"to {options.target} nats a character — median (range) of {options.runs} seeds")
for name, runs in rows.items():
    shown = f"{spread([r['steps'] for r in runs], 0)} steps, {spread([r['seconds'] for r in runs], 1)} s"
    if not all(run["reached"] for run in runs):
        shown = f"not within {options.most} steps: {spread([r['loss'] for r in runs], 3)}"
    print(f"  {name:<6} lr {runs[0]['rate']:<6} {shown}")
write(options.json, {"target": options.target, "runs": rows})
