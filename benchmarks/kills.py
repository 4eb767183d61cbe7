"""kill -9 at random moments, chained, over one run; then every bit of the end state against a run left in peace.

Each kill waits for a step drawn at random over the whole run and then up to a twentieth of a second, so that it falls
into steps and into the writing of checkpoints alike; every fifth comes while the process still starts. The same command
is given again after each. Prints what each kill met.

python benchmarks/kills.py --kills 10 --steps 4000 --seed 1 --json kills.json
"""

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WORDS = ["the", "king", "and", "queen", "walked", "slowly", "over", "old", "stones;", "nobody", "answered.\n"]
SETTINGS = {
    "tokenizer.kind": "char", "model.family": "qwen3", "model.hidden_size": 16, "model.num_hidden_layers": 1,
    "model.num_attention_heads": 2, "model.dropout": 0.1, "train.context": 16, "train.batch_tokens": 64,
    "train.micro_batch": 2, "train.optimizer": "muon", "train.precision": "fp32", "train.compile": "false",
    "train.threads": 1, "train.checkpoint_every": 20, "train.log_every": 1, "train.tensorboard": "false",
    "generate.max_new_tokens": 8,
}  # fmt: skip


def command(text: Path, out: Path, steps: int) -> list[str]:
    recipe = out.parent / "empty.yaml"
    recipe.write_text("{}\n")
    settings = SETTINGS | {"data.train": str(text), "train.max_steps": steps, "train.eval_every": max(steps // 4, 1)}
    overrides = [f"{key}={value}" for key, value in settings.items()]
    return [sys.executable, "-m", "gptworks", "train", str(recipe), *overrides, "--out", str(out), "--quiet"]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def steps_logged(out: Path) -> list[int]:
    """The steps whose training loss is in metrics.jsonl; a line still being written does not count."""
    path = out / "metrics.jsonl"
    if not path.is_file():
        return []
    rows = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("}\n")]
    return [row["step"] for row in rows if "train/loss" in row]


def progress(out: Path) -> int:
    """The last step logged, from the end of the file alone."""
    try:
        with open(out / "metrics.jsonl", "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 2000))
            lines = [line for line in file.read().split(b"\n")[:-1] if line.startswith(b'{"step": ')]
        return int(lines[-1].split(b",")[0].split(b":")[1]) if lines else 0
    except OSError:
        return 0


def end_state(out: Path, steps: int) -> dict[str, str]:
    """SHA-256 of the weights and optimizer state on disk, and of the counters that the next step depends on."""
    last = out / "checkpoints" / f"step-{steps:08d}"
    files = {"weights": last / "model.safetensors", "optimizer": last / "optimizer.safetensors"}
    found = {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in files.items()}
    found["model folder"] = hashlib.sha256((out / "model" / "model.safetensors").read_bytes()).hexdigest()
    state = json.loads((last / "state.json").read_text())
    keys = ("step", "tokens", "cursor", "best_loss", "evals_since_best")
    return found | {"counters": json.dumps({key: state[key] for key in keys}, sort_keys=True)}


def kill_once(line: list[str], out: Path, target: int | None, pause: float) -> dict[str, Any] | None:
    """Starts the command and kills it at `target` (None: during start-up) plus `pause`; None if it ended before."""
    before = progress(out)
    process = subprocess.Popen(line, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        while target is not None and progress(out) < target and process.poll() is None:
            time.sleep(0.002)
        time.sleep(pause)
        ended = process.poll()
        process.kill()
        _, errors = process.communicate()
    finally:
        process.kill()
        process.wait()
    if ended is not None:
        if ended:
            raise SystemExit(f"exit code {ended}: {errors.decode(errors='replace')}")
        return None
    kept = sorted((out / "checkpoints").glob("step-*")) if (out / "checkpoints").is_dir() else []
    half = list((out / "checkpoints").glob(".*.tmp")) if kept else []
    return {
        "when": "start-up" if target is None else "training",
        "from_step": before,
        "at_step": progress(out),
        "checkpoint": int(kept[-1].name.split("-")[1]) if kept else 0,
        "half_written": bool(half),
    }


def finish(line: list[str]) -> float:
    start = time.perf_counter()
    done = subprocess.run(line, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    if done.returncode:
        raise SystemExit(f"exit code {done.returncode}: {done.stderr.decode(errors='replace')}")
    return time.perf_counter() - start


def measure(folder: Path, kills: int, steps: int, seed: int, startup: bool = True) -> dict[str, Any]:
    """The straight run, the chain of kills, and what differs between their end states (nothing, one hopes)."""
    draw = random.Random(seed)
    text = folder / "text.txt"
    text.write_text(" ".join(draw.choice(WORDS) for _ in range(4000)))
    straight, chain = folder / "straight", folder / "chain"
    straight_seconds = finish(command(text, straight, steps))

    line = command(text, chain, steps)
    targets = sorted(draw.randint(1, max(1, int(steps * 0.95))) for _ in range(kills))
    met = []
    for number, target in enumerate(targets, start=1):
        early = startup and number % 5 == 0
        pause = draw.uniform(0.0, 4.0 if early else 0.05)
        found = kill_once(line, chain, None if early else target, pause)
        if found is None:
            break
        met.append(found)
    finish(line)

    ours, theirs = end_state(chain, steps), end_state(straight, steps)
    logged = steps_logged(chain)
    differs = [name for name in ours if ours[name] != theirs[name]]
    if logged != list(range(1, steps + 1)):
        differs.append("steps in metrics.jsonl")
    return {
        "steps": steps,
        "seed": seed,
        "kills": met,
        "survived": len(met),
        "straight_seconds": straight_seconds,
        "weights_sha256": theirs["weights"],
        "differs": differs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    from common import table, write

    with tempfile.TemporaryDirectory(dir=".") as folder:
        found = measure(Path(folder), options.kills, options.steps, options.seed)
    print("kill  when      from step  at step  newest checkpoint  one half written")
    for number, kill in enumerate(found["kills"], start=1):
        half = "yes" if kill["half_written"] else "no"
        print(
            f"{number:>4}  {kill['when']:<8}  {kill['from_step']:>9}  {kill['at_step']:>7}  "
            f"{kill['checkpoint']:>17}  {half:>16}"
        )
    verdict = "equal in every bit" if not found["differs"] else f"DIFFERENT: {', '.join(found['differs'])}"
    table(
        f"{found['survived']} kills over {found['steps']:,} steps, seed {found['seed']}",
        [("end state against the straight run", verdict), ("weights, SHA-256", found["weights_sha256"])],
    )
    write(options.json, found)
    sys.exit(1 if found["differs"] or found["survived"] < options.kills else 0)


if __name__ == "__main__":
    main()
